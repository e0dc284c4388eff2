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
from hf_ptune.injection.calls import Slot, bind
from hf_ptune.injection.embeddings import InputPrompt, splice

_FIRST = (None, "cls", "bos", "first")


def reads_first_token(body: nn.Module) -> bool:
    """Whether a head over this body, as transformers has them, reads the first token's state alone, of all tokens'."""
    config: Any = body.config
    if len(getattr(config, "block_sizes", None) or ()) > 1:  # Funnel: fewer states than tokens
        return False
    named = {getattr(config, name, None) for name in ("classifier_pooling", "summary_type")}
    return named <= set(_FIRST) and isinstance(_producer(body), nn.Module)


def _producer(body: nn.Module) -> nn.Module | None:
    """The module that gives out the last states; the body itself, where it has no pooler of its own."""
    if not has_pooler(body):
        return body
    producer: nn.Module | None = getattr(body, "encoder", None)
    return producer


def own_tokens(named: dict[str, Any], reason: str = "the mean of a row's tokens needs [B, S].") -> Tensor | None:
    """Mark the own tokens of a call's rows.

    Args:
        named: arguments of a body, from before a prompt is put among them.
        reason: why the mask must tell them, for the message.

    Returns:
        One for own tokens, zero for pads `[B, S]`; `None` where the call names no tokens.

    Raises:
        InjectionError: the mask is another one.
    """
    mask, ids, embeds = (named.get(n) for n in ("attention_mask", "input_ids", "inputs_embeds"))
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = f"has {mask.dim()} axes" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise InjectionError(f"attention_mask {found}; {reason}")
    tokens = ids if embeds is None else embeds[..., 0]
    return mask if mask is not None or tokens is None else torch.ones_like(tokens)


def mean_first(states: Tensor, own: Tensor) -> Tensor:
    """Put the mean of the own tokens in the place of each row's first state.

    Args:
        states: `[B, N, H]`.
        own: one for own tokens, else zero `[B, S]`, S being at most N: some bodies fill rows up to whole blocks.

    Returns:
        `[B, N, H]`.
    """
    weights = nn.functional.pad(own.to(states), (0, states.shape[1] - own.shape[1]))
    mean = (weights / weights.sum(1, keepdim=True).clamp(min=1))[:, None] @ states
    return torch.cat([mean, states[:, 1:]], 1)


def has_pooler(body: nn.Module) -> bool:
    """Whether a body pools by itself, behind its encoder."""
    return isinstance(getattr(body, "pooler", None), nn.Module)


def pool_again(body: nn.Module, states: Tensor) -> Tensor:
    """What a body's own pooler makes of other last states `[B, N, H]`: `[B, H]`."""
    pooler: Any = body.pooler
    if isinstance(pooler, nn.Linear):  # ALBERT and BigBird take first state and activation apart
        activation: Any = getattr(body, "pooler_activation", None) or getattr(body, "activation", nn.Identity())
        pooled: Tensor = activation(pooler(states[:, 0]))
        return pooled
    pooled = pooler(states)
    return pooled


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
        self.own = Slot()  # [B, S], while the body runs with the prompt
        self.handles = [
            body.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            producer.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.own.put(own_tokens(bind(module, args, kwargs)) if self.active() else None)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        own = self.own.take()
        if own is None:
            return None
        if self.inputs is not None:
            rows = own.shape[0]  # len() would make a number of a size that torch.export leaves open
            at = self.inputs.places(own, rows, own.device)
            own = splice(own, own.new_zeros(rows, self.virtual), at)
        pooled = mean_first(output[0], own)
        if isinstance(output, ModelOutput):
            output[next(iter(output.keys()))] = pooled
            return output
        return pooled if isinstance(output, Tensor) else (pooled, *output[1:])
