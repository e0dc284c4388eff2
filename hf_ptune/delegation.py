"""What a script asks or sets of a model that is its backbone's: embeddings, precision, checkpointing, attention."""

from typing import Any, Self, cast

from torch import nn
from transformers.utils import logging

from hf_ptune.errors import PTuneError
from hf_ptune.loading import lost_embeddings
from hf_ptune.saving import SavedAdapter

logger = logging.get_logger(__name__)


class Delegating(SavedAdapter):
    """Hand settings on to the backbone, and keep the injection where they change what it holds."""

    def _reattach(self) -> None:
        raise NotImplementedError

    @property
    def base_model(self) -> nn.Module:
        """The backbone's body, without its head; the prompt works where that is called by itself, too."""
        return self.backbone.base_model

    @property
    def loss_function(self) -> Any:
        """The backbone's, which computes the loss."""
        return self.backbone.loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.backbone.loss_function = value

    @property
    def num_labels(self) -> int:
        """The backbone's, where its class keeps it: scripts with a loss of their own ask the model for it."""
        return cast(int, self.backbone.num_labels)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        self.backbone.num_labels = value

    def to(self, *args: Any, **kwargs: Any) -> Self:
        self.backbone.to(*args, **kwargs)  # which refuses what its quantisation cannot take
        return cast(Self, super().to(*args, **kwargs))

    def half(self, *args: Any) -> Self:
        self.backbone.half(*args)
        return cast(Self, super().half(*args))

    def float(self, *args: Any) -> Self:
        self.backbone.float(*args)
        return cast(Self, super().float(*args))

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise PTuneError(
            "an adapter of PEFT inside would not be saved with the prompt. Merge it into the base, save that, and wrap "
            "what is loaded from there; or start the prompt from another one by prompt_tuning_init='ADAPTER'."
        )

    load_adapter = add_adapter

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)
        self._reattach()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)
        self._reattach()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        resized = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.set_base(self.backbone.config, self.backbone.dtype)
        self._reattach()
        if (lost := lost_embeddings(self)) is not None:
            logger.warning(lost)
        return cast(nn.Embedding, resized)

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """The backbone's, which an encoder-decoder has more of."""
        return cast(dict[str, Any], self.backbone.dummy_inputs)

    def get_position_embeddings(self) -> Any:
        return self.backbone.get_position_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Refuse positions that the base, as an adapter's folder names it, would not have.

        Raises:
            PTuneError: another number of them than the base has.
            NotImplementedError: the base's positions cannot be resized.
        """
        self.backbone.get_position_embeddings()
        found = self.backbone.config.max_position_embeddings
        if new_num_position_embeddings != found:
            raise PTuneError(
                f"the base has {found} positions, not {new_num_position_embeddings}: an adapter's folder holds none of "
                "them, and names a base as it is. Resize them in the base, save it, and wrap what is loaded from there."
            )

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.backbone.get_encoder(*args, **kwargs)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.backbone.get_decoder(*args, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        base: Any = self.backbone
        # transformers 5.21 has its older name alone
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, *args, **kwargs)
        reentrant = bool((activation_checkpointing_kwargs or {}).get("use_reentrant", False))
        if reentrant and self.prompt is None:
            self.backbone.enable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, *args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.backbone.gradient_checkpointing_disable()

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.backbone.set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config._attn_implementation_internal = self.backbone.config._attn_implementation
        if self._injector is not None:
            self._injector.install()
