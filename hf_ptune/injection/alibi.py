"""Where virtual tokens stand for families that bias scores by position (ALiBi, Press et al. 2022)."""

import math
from typing import Any

import torch

from hf_ptune.injection.calls import cache_of
from hf_ptune.injection.sites import Site


def slopes(heads: int, max_bias: float = 8.0, interleave: bool = False) -> list[float]:
    """Slopes per head (Press et al. 2022, section 3).

    Args:
        heads: H; where it is no power of 2, families fill up in two different orders.
        max_bias: exponent of the last slope.
        interleave: the order of MPT, rather than that of BLOOM and Falcon.
    """
    if interleave:
        full = 2 ** math.ceil(math.log2(heads))
        values = [2 ** (-(i * max_bias / full)) for i in range(1, full + 1)]
        return values if full == heads else [*values[1::2], *values[::2]][:heads]
    full = 2 ** math.floor(math.log2(heads))
    values = [2 ** (-(i * max_bias / full)) for i in range(1, full + 1)]
    rest = min(full, heads - full)
    return values + [2 ** (-(i * max_bias / (2 * full))) for i in range(1, 1 + 2 * rest, 2)]


def prefix_bias(module: Any, site: Site, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Bias `[B or 1, H, 1, P]` of virtual tokens that stand before the own first token, or `None` without ALiBi."""
    if site.key is None:
        return None
    family = type(module).__name__
    if family in ("BloomAttention", "FalconAttention"):
        if family == "FalconAttention" and kwargs.get("alibi") is None:
            return None
        # own keys count from 0 at the first real token
        return _ramp(slopes(module.num_heads), site).to(site.key.device)
    if family == "MptAttention" and kwargs.get("position_bias") is not None:
        bias = _ramp(slopes(module.n_heads, site.config.attn_config.alibi_bias_max, True), site)
        return bias.to(site.key.device) + _first_key_bias(module, kwargs)
    return None


def bias_of_mask(module: Any, bias: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a mask adds to that bias once more: Falcon's own holds it too, scaled as the scores are."""
    mask = kwargs.get("attention_mask")
    if bias is None or type(module).__name__ != "FalconAttention" or mask is None or mask.dim() != 4:
        return None
    return bias * module.inv_norm_factor if mask.shape[1] == module.num_heads else None


def _ramp(per_head: list[float], site: Site) -> torch.Tensor:
    virtual = site.num_virtual_tokens
    back = torch.arange(-virtual, 0, dtype=torch.float32)
    return (torch.tensor(per_head)[:, None] * back)[None, :, None]  # [1, H, 1, P]


def _first_key_bias(module: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    # MPT counts keys from the last one, pads included: find each row's first real key
    mask, bias = kwargs.get("attention_mask"), kwargs["position_bias"]  # [B, 1, S, T], [H, 1, >= T]
    if mask is None:
        past = cache_of(kwargs)
        keys = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else 1
        keys += past.get_seq_length(module.layer_idx) if past is not None else 0
        return bias[:, :, bias.shape[-1] - keys][None, :, :, None].to(torch.float32)
    last = mask[:, 0, -1]
    hidden = last if mask.dtype == torch.bool else last < 0
    first = (~hidden).int().argmax(-1)  # [B]
    return bias[:, 0, bias.shape[-1] - mask.shape[-1] + first].T[:, :, None, None].to(torch.float32)
