"""One sweep over the weights for a prompt and the batch that it precedes.

A prompt `[P, H]` of a causal model needs one pass of its own, and the batch another over the same weights. While
training, both are laid in one sequence of batch 1, `[P | row 0 | row 1 | …]`: whatever works on tokens sees one
tensor, and every attention site takes the sequence apart again, gives the prompt its own causal attention, and
the rows theirs over [prompt | own tokens]. Masks come from the backbone's own mask functions, asked for the shapes
of prompt and rows.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_ptune.errors import InjectionError
from hf_ptune.injection.registered import is_sealed, replace, seal
from hf_ptune.injection.sites import Site

_current = threading.local()
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "output_hidden_states"}
_FIELDS = {"last_hidden_state", "hidden_states"}


@dataclass
class Layout:
    """How a joint sequence is laid out.

    Args:
        virtual: P.
        rows: B.
        length: S.
        mask: of own tokens, `[B, S]`.
    """

    virtual: int
    rows: int
    length: int
    mask: Tensor | None

    @property
    def total(self) -> int:
        return self.virtual + self.rows * self.length

    def rows_of(self, joint: Tensor) -> Tensor:
        """`[1, P + B * S, H]` to `[B, S, H]`."""
        return joint[0, self.virtual :].unflatten(0, (self.rows, self.length))


@dataclass
class JointMask:
    """What a mask function says of the prompt, and of the rows; handed through the layers as one mask."""

    layout: Layout
    prompt: Any
    rows: Any


def install(name: str) -> None:
    """Make the mask function registered under `name` answer for joint sequences."""
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if function is not None and not is_sealed(function):
        replace(ALL_MASK_ATTENTION_FUNCTIONS, name, _wrap(function))


def is_installed(name: str) -> bool:
    """Whether the mask function that stands under `name` now answers for joint sequences."""
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    return function is None or is_sealed(function)


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def mask(*args: Any, **kwargs: Any) -> Any:
        layout: Layout | None = getattr(_current, "layout", None)
        if layout is None or args or kwargs.get("q_length") != layout.total:
            return function(*args, **kwargs)
        shapes = (
            {"batch_size": 1, "q_length": layout.virtual, "kv_length": layout.virtual, "attention_mask": None},
            {
                "batch_size": layout.rows,
                "q_length": layout.length,
                "kv_length": layout.length,
                "attention_mask": None if layout.mask is None else layout.mask.to(kwargs["device"], torch.bool),
            },
        )
        return JointMask(layout, *(function(**(kwargs | shape)) for shape in shapes))

    return seal(mask)


def can_join(named: dict[str, Any]) -> bool:
    """Whether a call of the body asks for nothing that a joint sequence could not give."""
    given = {k for k, v in named.items() if v is not None and v is not False}
    mask, counted = named.get("attention_mask"), named.get("position_ids")
    # without a mask, backbones tell packed sequences apart by positions
    plain = counted is None if mask is None else isinstance(mask, Tensor) and mask.dim() == 2
    plain = plain and (counted is None or counted.dim() == 2)  # one axis, not those of images
    return plain and given <= _KNOWN and not named.get("use_cache")


def begin(layout: Layout | None) -> None:
    """Let mask functions answer for this layout; `None` ends it."""
    _current.layout = layout


def join(
    named: dict[str, Any], prompt: Tensor, embed: Callable[[Tensor], Tensor], positions: Tensor
) -> tuple[dict[str, Any], Layout]:
    """Lay a prompt and a batch in one sequence.

    Args:
        named: arguments of the body.
        prompt: `[P, H]`.
        embed: the word embeddings.
        positions: of own tokens, `[B or 1, S]`.

    Returns:
        The arguments of the joint call, and its layout.
    """
    embeds = named.get("inputs_embeds")
    if embeds is None:
        embeds = embed(named["input_ids"])
    rows, length = embeds.shape[:2]
    layout = Layout(prompt.shape[0], rows, length, named.get("attention_mask"))
    before = torch.arange(prompt.shape[0], device=positions.device)
    joint = {
        "inputs_embeds": torch.cat([prompt.to(embeds), embeds.flatten(0, 1)])[None],
        "attention_mask": torch.ones(1, layout.total, dtype=torch.long, device=embeds.device),
        "position_ids": torch.cat([before, positions.expand(rows, -1).flatten()])[None],
        "use_cache": False,
    }
    if named.get("output_hidden_states"):
        joint["output_hidden_states"] = True
    return joint, layout


def part(output: Any, layout: Layout) -> Any:
    """Cut the prompt from the body's outputs and give the rows back their shape.

    Raises:
        InjectionError: outputs that hold more than hidden states.
    """
    if not isinstance(output, dict) or {k for k, v in output.items() if v is not None} - _FIELDS:
        raise InjectionError(
            f"the backbone gave {sorted(output) if isinstance(output, dict) else type(output).__name__} where hidden "
            "states alone were expected; pass output_hidden_states, and other wishes, with the call."
        )
    for name, value in output.items():
        if isinstance(value, Tensor):
            output[name] = layout.rows_of(value)
        elif value is not None:
            output[name] = tuple(layout.rows_of(v) for v in value)
    return output


def attend(
    attention: Callable[..., Any],
    site: Site,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: JointMask,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attend over a joint sequence: the prompt over itself, the rows over the prompt and themselves.

    Args:
        attention: the wrapped attention function.
        site: of the module.
        module: the attention module.
        tensors: query, key, value `[1, H or K, P + B * S, D]`.
        mask: of the sequence.
        kwargs: of the attention function.
    """
    layout = mask.layout
    parts = _Apart.apply(*tensors, layout)
    prompt, rows = parts[:3], parts[3:]
    site.fill(None)
    first = attention(module, *(t[None] for t in prompt), mask.prompt, **kwargs)[0]  # 1 P H D
    site.fill(prompt[1:])
    try:
        second = attention(module, *rows, mask.rows, **kwargs)[0]  # B S H D
    finally:
        site.fill(None)
    return torch.cat([first, second.view(1, -1, *second.shape[2:])], dim=1), None


class _Apart(torch.autograd.Function):
    """Query, key, value `[1, H, P + B * S, D]` to three of the prompt `[H, P, D]` and three of rows `[B, H, S, D]`.

    They are views, made in one step of the graph where each would take several, and several more in the backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        virtual, rows, length = layout.virtual, layout.rows, layout.length
        prompts, others = [], []
        for tensor in (query, key, value):
            _, heads, _, width = tensor.shape
            _, head, token, one = tensor.stride()
            start = tensor.storage_offset()
            prompts.append(tensor.as_strided((heads, virtual, width), (head, token, one), start))
            shape, strides = (rows, heads, length, width), (length * token, head, token, one)
            others.append(tensor.as_strided(shape, strides, start + virtual * token))
        return (*prompts, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # tokens first, as they lie in memory behind a projection
        pairs = zip(grads[:3], grads[3:], strict=True)
        joined = [torch.cat([p.transpose(0, 1), r.transpose(1, 2).reshape(-1, *r.shape[1::2])]) for p, r in pairs]
        return (*(t.transpose(0, 1)[None] for t in joined), None)
