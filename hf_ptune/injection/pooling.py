"""What heads of encoders pool: the mean of a row's own tokens, where they read the state of the first one.

The first token of an encoder takes up attention that no other token wants, and its state may say little of the row.
The mean takes its place among the last states, before anything inside or behind the body reads them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_ptune.errors import InjectionError
from hf_ptune.injection.calls import bind, this_thread
from hf_ptune.injection.embeddings import InputPrompt, splice

_FIRST = (None, "cls", "bos", "first")


def reads_first_token(body: nn.Module) -> bool:
    """Whether a head over this body, as transformers has them, reads the state of the first token alone."""
    config: Any = body.config
    named = {getattr(config, name, None) for name in ("classifier_pooling", "summary_type")}
    return named <= set(_FIRST) and isinstance(_producer(body), nn.Module)


def _producer(body: nn.Module) -> nn.Module | None:
    """The module that gives out the last states; the body itself, where it has no pooler of its own."""
    if not isinstance(getattr(body, "pooler", None), nn.Module):
        return body
    producer: nn.Module | None = getattr(body, "encoder", None)
    return producer


class MeanPooling:
    """Put the mean of each row's own tokens, virtual ones and pads left out, in the place of its first last state.

    Args:
        body: an encoder whose heads read the first token.
        inputs: the prompt among its inputs, if there is one; it is attached already.
        virtual: number of its tokens.
        active: whether the prompt is at work.
    """

    def __init__(self, body: nn.Module, inputs: InputPrompt | None, virtual: int, active: Callable[[], bool]) -> None:
        producer = _producer(body)
        assert producer is not None
        # behind the body the virtual tokens have left the states already
        self.inputs = inputs if producer is not body else None
        self.virtual = virtual
        self.active = active
        self.own: dict[int, Tensor | None] = {}  # thread to [B, S], while the body runs
        self.handles = [
            body.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            producer.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = bind(module, args, kwargs)
        mask, ids, embeds = (named.get(n) for n in ("attention_mask", "input_ids", "inputs_embeds"))
        if mask is not None and mask.dim() != 2:
            raise InjectionError(f"attention_mask has {mask.dim()} axes; the mean of a row's tokens needs [B, S].")
        tokens = ids if embeds is None else embeds[..., 0]
        self.own[this_thread()] = mask if mask is not None or tokens is None else torch.ones_like(tokens)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        own = self.own.pop(this_thread(), None)
        if own is None or not self.active():
            return None
        states: Tensor = output[0]
        weights = self._weights(own, states)
        mean = (weights / weights.sum(1, keepdim=True).clamp(min=1))[:, None] @ states
        pooled = torch.cat([mean, states[:, 1:]], 1)
        if isinstance(output, ModelOutput):
            output[next(iter(output.keys()))] = pooled
            return output
        return pooled if isinstance(output, Tensor) else (pooled, *output[1:])

    def _weights(self, own: Tensor, states: Tensor) -> Tensor:
        """One for own tokens, else zero `[B, N]`, N being the tokens that the producer saw."""
        batch, count = states.shape[:2]
        if self.inputs is not None:
            at = self.inputs.places(own, batch, own.device)
            own = splice(own, own.new_zeros(batch, self.virtual), at)
        return nn.functional.pad(own.to(states), (0, count - own.shape[1]))  # bodies that fill rows up to whole blocks
