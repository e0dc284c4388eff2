"""The configuration of an adapter: the method, its options, and the base it belongs to."""

import copy
from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hf_ptune.errors import ConfigError
from hf_ptune.methods import PromptKind, get_method

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS", "ZERO")
SITES = ("encoder", "decoder", "cross")
# answered by the base's own configuration, so that scripts and pipelines see what they would see there
_FROM_BASE = (
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "output_hidden_states",
    "return_dict",
)


@strict(accept_kwargs=True)
class PTuneConfig(PreTrainedConfig):
    """Describe an adapter: method, options, and the base it was trained on.

    Args:
        method: "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2" or "bitfit".
        num_virtual_tokens: P, number of virtual tokens, at least 1; BitFit ignores it.
        prompt_tuning_init: "RANDOM" (with the deviation of the backbone's own embeddings, or of its own keys
            and values), "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS" or "ZERO". A prefix takes the backbone's keys
            and values of the named tokens.
        prompt_tuning_init_text: the text of "TEXT".
        encoder_reparameterization_type: "MLP" or "LSTM"; P-Tuning only.
        encoder_hidden_size: width inside the reparameterisation; the embedding width when unset.
        encoder_num_layers: LSTM layers; P-Tuning only.
        encoder_dropout: dropout inside the reparameterisation, 0 to 1.
        prefix_dropout: dropout on the encoded prompt while training, 0 to 1.
        layers: layer numbers that take a prefix; all when unset.
        sites: attention sites of an encoder-decoder that take a prefix, of "encoder", "decoder", "cross".
        position_shift: whether own tokens stand after the virtual ones in the position count. Unset: yes in
            causal models that take `position_ids`, no in encoders, so that their full length stays usable.
        loss_at_labels: whether language models compute logits only where a label counts while they train; loss
            and gradients stay the same. Logits that somebody asks for all the same cost a second forward pass.
        modules_to_save: further modules of the backbone that are trained and saved; a task's head always is.
        flattened: whether the reparameterisation has been folded into the prompt.
    """

    model_type: ClassVar[str] = "ptune"
    sub_configs: ClassVar[dict[str, Any]] = {}

    method: str = "p_tuning_v2"
    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    prefix_dropout: float = 0.0
    layers: list[int] | None = None
    sites: list[str] | None = None
    position_shift: bool | None = None
    loss_at_labels: bool = True
    modules_to_save: list[str] | None = None
    flattened: bool = False
    task: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_class: str | None = None
    base_config: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.prompt_tuning_init = str(self.prompt_tuning_init).upper()
        self.encoder_reparameterization_type = str(self.encoder_reparameterization_type).upper()
        self._check()
        self._mirror_base()

    def _check(self) -> None:
        method = get_method(self.method)
        choices: list[tuple[str, Any, tuple[str, ...]]] = [
            ("prompt_tuning_init", self.prompt_tuning_init, INITS),
            ("encoder_reparameterization_type", self.encoder_reparameterization_type, ("MLP", "LSTM")),
        ]
        choices += [("sites", site, SITES) for site in self.sites or []]
        for name, value, allowed in choices:
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(allowed)}.")
        if method.kind is not None and self.num_virtual_tokens < 1:
            raise ConfigError(f"num_virtual_tokens={self.num_virtual_tokens}; expected at least 1.")
        for name in ("encoder_dropout", "prefix_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 0 or more and less than 1.")
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text:
            raise ConfigError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text, the text to start from.")
        if method.kind is PromptKind.EMBEDDINGS and self.layers is not None:
            raise ConfigError(f"layers is for prefixes; {self.method} puts its prompt into the input only.")

    def _mirror_base(self) -> None:
        # the base's own object, made anew from its dictionary: sharing a live one unsets its attention
        if not self.base_config:
            object.__setattr__(self, "_base", None)
            return
        settings = copy.deepcopy(self.base_config)
        model_type = settings.pop("model_type", "")
        if model_type not in CONFIG_MAPPING:
            raise ConfigError(
                f"base_config has model_type={model_type!r}, which this version of transformers does not know; "
                "install the version the adapter was trained with."
            )
        base = CONFIG_MAPPING[model_type].from_dict(settings)
        object.__setattr__(self, "_base", base)
        for name in _FROM_BASE:
            setattr(self, name, getattr(base, name))
        # what the base alone knows (vocab_size, hidden_size, pad_token_id, …)
        self.tie_word_embeddings = False

    def set_base(self, base: PreTrainedConfig) -> None:
        """Take over the configuration of a loaded base."""
        self.base_config = base.to_dict()
        self.base_config.pop("quantization_config", None)  # how a base is loaded is up to whoever loads it
        self._mirror_base()

    @property
    def base(self) -> PreTrainedConfig:
        """The base's configuration, a copy of the one its model holds."""
        base: PreTrainedConfig | None = self.__dict__.get("_base")
        if base is None:
            raise ConfigError("this configuration names no base yet; get_ptune_model(backbone, config) sets it.")
        return base

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("_base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(base, name)
        except RuntimeError as error:  # differs by layer, so that the base has no one answer either
            raise AttributeError(str(error)) from error

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        base = self.__dict__.get("_base")
        return self if base is None else base.get_text_config(decoder=decoder, encoder=encoder)

    # the base's own checks ran when its configuration was made
    def validate_output_attentions(self) -> None: ...

    def validate_architecture(self) -> None: ...

    def validate_token_ids(self) -> None: ...

    def validate_layer_type(self) -> None: ...

    def _get_generation_parameters(self) -> dict[str, Any]:
        # the base's are its generation config's business, and would be refused here
        return {}

    def to_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().to_dict()
        settings.pop("_base", None)
        return settings

    def to_diff_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().to_diff_dict()
        settings.pop("_base", None)
        return settings


AutoConfig.register(PTuneConfig.model_type, PTuneConfig, exist_ok=True)
