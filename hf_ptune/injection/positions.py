"""Positions of own tokens, and where they stand when the prompt counts before them."""

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
