"""Positions of own tokens, and where they stand when the prompt counts before them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_ptune.injection.calls import cache_of


def learned_table(body: nn.Module) -> tuple[nn.Embedding, int] | None:
    """An encoder's table of positions, and its row for the first token (pads may come before); `None` without one."""
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table, 0 if table.padding_idx is None else table.padding_idx + 1


def own_positions(named: dict[str, Any], table: tuple[nn.Embedding, int] | None = None) -> Tensor:
    """Positions `[B or 1, S]` of a call's tokens.

    Args:
        named: the call's arguments.
        table: of an encoder that counts by it; then as the encoder itself counts. Else from the mask, so that pads
            move nothing.
    """
    own = named.get("input_ids")
    ids, own = own, named["inputs_embeds"] if own is None else own
    length = own.shape[1]
    if table is not None:
        pad, first = table[0].padding_idx, table[1]
        if pad is None or ids is None:
            return first + torch.arange(length, device=own.device)[None]
        real = (ids != pad).long()
        return real.cumsum(-1) * real + pad
    mask = named.get("attention_mask")
    past = cache_of(named)
    seen = past.get_seq_length() if past is not None and hasattr(past, "get_seq_length") else 0
    if isinstance(seen, Tensor) and not torch.compiler.is_compiling():
        seen = int(seen)  # of a static cache
    if isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(seen, int):
        counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return counted[:, seen : seen + length].to(own.device)
    return (torch.arange(length, device=own.device) + seen)[None]


def settled(named: dict[str, Any], around: dict[str, Any], table: tuple[nn.Embedding, int] | None = None) -> Tensor:
    """Positions of a call's tokens, `[B or 1, S]`, or `[N, B, S]` where images are counted along several axes.

    Args:
        named: arguments of the model that counts.
        around: those of the body around it, which may have counted already, images and all.
        table: as in `own_positions`.
    """
    given, mask = named.get("position_ids"), around.get("attention_mask")
    length = _length(named)
    if given is None:
        return own_positions(around if _length(around) == length else named, table)
    positions: Tensor = given[..., -length:]  # Qwen2-VL's kin count what is in a cache once more
    if around is named or around.get("position_ids") is not None or positions.dim() != 2:
        return positions
    if isinstance(mask, Tensor) and mask.dim() == 2:  # counted from 0 or 1, pads and all: these move nothing
        plain = (positions.diff(dim=-1) == 1).all()
        pads = mask.to(positions.device).long().argmax(-1, keepdim=True)  # [B, 1]
        positions = positions - pads * plain
    return positions


def _length(named: dict[str, Any]) -> int:
    tokens = next((named[n] for n in ("input_ids", "inputs_embeds") if named.get(n) is not None), None)
    return 0 if tokens is None else int(tokens.shape[1])


def image_counters(body: nn.Module) -> list[nn.Module]:
    """What in a body keeps how far the images of its last call have moved the text behind them."""
    return [m for m in body.modules() if hasattr(m, "rope_deltas")]


@contextmanager
def of_text_alone(counters: list[nn.Module]) -> Iterator[None]:
    """Let a body forget the images of its last call for a while: it would count what has no ids from them."""
    kept = [(m, m.rope_deltas) for m in counters]
    for module, _ in kept:
        module.rope_deltas = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


def moved(positions: Tensor, by: int, table: tuple[nn.Embedding, int] | None = None) -> Tensor:
    """Positions behind a prompt of `by` tokens; at the end of a table they go on at its start, pads stay."""
    if table is None:
        return positions + by
    rows, first = table[0].num_embeddings, table[1]
    return torch.where(positions < first, positions, first + (positions - first + by) % (rows - first))


def follow_length(body: nn.Module) -> bool:
    """Whether rotary frequencies depend on the length of a pass, as dynamic NTK's and longrope's do."""
    kinds: list[Any] = []
    for module in body.modules():
        kind = getattr(module, "rope_type", None)
        kinds += kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)
