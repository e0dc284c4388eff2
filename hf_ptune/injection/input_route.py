"""Route 3: a prompt among the inputs of an encoder, behind each row's first real token; outputs have none of it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import InjectionError
from hf_ptune.injection import embeddings
from hf_ptune.injection.calls import Slot, bind
from hf_ptune.injection.embeddings import InputPrompt


class InputRoute:
    """Put a prompt among the inputs of an encoder, and take it out of what comes back.

    Args:
        backbone: the task model.
        inputs: knows the encoder.
        virtual: P.
        rows: gives the prompt `[P, H]`; `None` while it is turned off.
        active: whether the prompt is at work.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        inputs: InputPrompt,
        virtual: int,
        rows: Callable[[], Tensor | None],
        active: Callable[[], bool],
    ) -> None:
        self.inputs = inputs
        self.virtual = virtual
        self.rows = rows
        self.active = active
        self.as_tuple = Slot()  # whether the encoder-decoder was asked for a tuple
        encoder = inputs.encoder
        self.handles = [encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True, prepend=True)]
        if not embeddings.has_decoder(backbone):
            self.handles.append(encoder.register_forward_hook(self._after_encoder, with_kwargs=True))
            return
        decoder = backbone.base_model.get_decoder()
        self.handles += [
            encoder.register_forward_hook(self._after_encoder_of_two, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True, prepend=True),
            backbone.register_forward_pre_hook(self._before_seq2seq, with_kwargs=True),
            backbone.register_forward_hook(self._after_seq2seq, with_kwargs=True),
        ]

    def _before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = self.rows() if self.active() else None
        if rows is None:
            return None
        return (), self.inputs.insert(rows, bind(module, args, kwargs))

    def _after_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.active():
            return None
        _check_pooled(module, output, kwargs["inputs_embeds"])
        return self.inputs.cut(output, self.virtual, kwargs.get("attention_mask"))

    def _after_encoder_of_two(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # `generate` reports these as they are, and gives each row's last states to several sequences
        if not self.active():
            return None
        return self.inputs.cut_reports(output, self.virtual, kwargs.get("attention_mask"))

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active():
            return None
        named = bind(module, args, kwargs)
        states, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        if states is None or mask is None or mask.dim() != 2:
            return (), named
        if mask.shape == states.shape[:2]:
            raise InjectionError(
                "the encoder's states that were given have no virtual positions: outputs report them without. Give "
                "what model.get_encoder()(...) returns as encoder_outputs."
            )
        if mask.shape[1] == states.shape[1] - self.virtual:
            ones = mask.new_ones(mask.shape[0], self.virtual)
            at = self.inputs.places(mask, mask.shape[0], mask.device)
            named["encoder_attention_mask"] = embeddings.splice(mask, ones, at)
        return (), named

    def _before_seq2seq(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.as_tuple.take()  # of a call that went down
        named = bind(module, args, kwargs)
        given = named.get("return_dict")
        if not self.active() or (module.config.return_dict if given is None else given):
            return None
        self.as_tuple.put(True)  # of a tuple nobody knows what is the encoder's
        return (), named | {"return_dict": True}

    def _after_seq2seq(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        as_tuple, states = self.as_tuple.take(), getattr(output, "encoder_last_hidden_state", None)
        if not self.active() or states is None:
            return output.to_tuple() if as_tuple else None
        mask = bind(module, args, kwargs).get("attention_mask")
        at = self.inputs.places(mask, states.shape[0], states.device)
        own = states.shape[1] - self.virtual
        cut = embeddings.cut_encoder_fields(output, at, self.virtual, own)
        return cut.to_tuple() if as_tuple else cut


def _check_pooled(encoder: nn.Module, output: Any, embeds: Tensor) -> None:
    """Refuse states `[B, N, H]` that stand for several tokens each, as Funnel's do, and their attentions."""
    reports = (t for name in ("hidden_states", "attentions") for t in getattr(output, name, None) or ())
    fewest = min(t.shape[-2] for t in (output[0], *reports) if isinstance(t, Tensor))
    if fewest < embeds.shape[1]:
        pools = output[0].shape[1] < embeds.shape[1]
        cure = "" if pools else " Leave output_hidden_states and output_attentions out, or take"
        raise InjectionError(
            f"{type(encoder).__name__} gives {fewest} states for {embeds.shape[1]} tokens, from which a prompt among "
            f"its inputs cannot be taken out.{cure or ' Take'} a method that puts nothing there: p_tuning_v2, "
            "prefix_tuning, bitfit."
        )
