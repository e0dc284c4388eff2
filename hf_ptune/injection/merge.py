"""Attention over a prefix that all rows share, without a copy per row.

Attention over [prefix | own tokens] is attention over either part, weighted by the log-sum-exps of their scores.
The queries of all rows and of all heads that share a key head meet the prefix in one call of batch 1, so that its
keys and values, and their gradients, exist once. Backward needs no more than the kernels offer: given the merged
output and log-sum-exp, the backward of either part is that of its share (the identity behind ring attention).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ptune.injection.kernels import Kernel, kernel_for

_disabled = False


@contextmanager
def concatenated_attention() -> Iterator[None]:
    """Attend over copies of the prefix before every row, as the reference that the merge is compared with."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def merge_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Kernel | None:
    """The kernel that merges, or `None` where the prefix has to be concatenated.

    Args:
        query: `[B, H, S, D]`.
        key: own keys `[B, K, T, D]`.
        value: own values; another width than the keys' is concatenated.
        mask: boolean or additive `[.., S, T]`, or `None`; one with a gradient is concatenated.
        dropout: of the probabilities; the kernels of some devices take none.
    """
    plain = mask is None or (isinstance(mask, Tensor) and not mask.requires_grad and mask.dim() in (2, 4))
    alike = query.dim() == 4 and query.shape[0] == key.shape[0] and key.shape[-1] == value.shape[-1]
    if _disabled or dropout or not plain or not alike or query.shape[1] % key.shape[1]:
        return None
    return kernel_for(query.device.type, _working_type(query), query.shape[-1])


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    kernel: Kernel,
) -> Tensor:
    """Attend over a shared prefix and own tokens.

    Args:
        query: `[B, H, S, D]`.
        key: own keys `[B, K, T, D]`, H a multiple of K.
        value: own values `[B, K, T, D]`.
        prefix_key: `[K, P, D]`, visible to every query.
        prefix_value: `[K, P, D]`.
        mask: over own keys, boolean or additive `[.., S, T]`.
        causal: whether a query sees the own keys up to its own place, counted from the first.
        scale: of the scores; one over the root of D when unset.
        kernel: what `merge_kernel` chose.

    Returns:
        The output `[B, H, S, D]`.
    """
    if causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    dtype = _working_type(query)
    tensors = [t.to(dtype) for t in (query, key, value, prefix_key, prefix_value)]
    additive = None if mask is None else _additive(mask, dtype, query.shape[2], key.shape[2])
    how = (additive, causal, query.shape[-1] ** -0.5 if scale is None else scale, kernel)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        output: Tensor = _Merged.apply(*tensors, *how)
        return output
    return _forward(*tensors, *how)[0]


def _working_type(query: Tensor) -> torch.dtype:
    # the kernels are called below the level at which autocast casts
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def _additive(mask: Tensor, dtype: torch.dtype, queries: int, keys: int) -> Tensor:
    """Read a mask once for all layers that share it.

    Hidden keys get the lowest finite number: a query that sees none of them then keeps a finite log-sum-exp, and
    its own share vanishes beside the prefix's.
    """
    if torch.compiler.is_compiling():
        return _read(mask, dtype, queries, keys)
    kept: Any = mask.__dict__.get("_ptune_additive")
    of = (mask._version, dtype, keys)
    if kept is None or kept[0] != of:
        kept = mask.__dict__["_ptune_additive"] = (of, _read(mask, dtype, queries, keys))
    additive: Tensor = kept[1]
    return additive


def _read(mask: Tensor, dtype: torch.dtype, queries: int, keys: int) -> Tensor:
    lowest = torch.finfo(dtype).min
    seen = mask[..., :keys]
    if seen.dtype == torch.bool:
        additive = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, lowest)
    else:
        additive = seen.to(dtype).clamp(min=lowest)
    return additive.expand(*additive.shape[:-2], queries, keys)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    additive: Tensor | None,
    causal: bool,
    scale: float,
    kernel: Kernel,
) -> tuple[Tensor, Tensor]:
    own, own_lse = kernel.forward(query, key, value, additive, causal, scale)
    stacked, stacked_lse = kernel.forward(
        _stack(query, key.shape[1]), prefix_key[None], prefix_value[None], None, False, scale
    )
    shared, shared_lse = _unstack(stacked, query), _unstack(stacked_lse[..., None], query)[..., 0]
    share = torch.sigmoid(shared_lse - own_lse)[..., None]
    # half precision is merged in the precision of the log-sum-exp
    output = own.to(share.dtype).lerp(shared.to(share.dtype), share).to(own.dtype)
    return output, torch.logaddexp(own_lse, shared_lse)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, additive, causal, scale, kernel = args
        output, lse = _forward(*tensors, additive, causal, scale, kernel)
        ctx.save_for_backward(*tensors, additive, output, lse)
        ctx.causal, ctx.scale, ctx.kernel = causal, scale, kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, prefix_key, prefix_value, additive, output, lse = ctx.saved_tensors
        needs, backward = ctx.needs_input_grad[:5], ctx.kernel.backward
        grads: list[Tensor | None] = [None] * 5
        if any(needs[:3]):
            grads[:3] = backward(grad, query, key, value, additive, output, lse, ctx.causal, ctx.scale)
        if needs[0] or any(needs[3:]):
            heads = key.shape[1]
            to_query, to_key, to_value = backward(
                _stack(grad, heads),
                _stack(query, heads),
                prefix_key[None],
                prefix_value[None],
                None,
                _stack(output, heads),
                _stack(lse[..., None], heads)[..., 0],
                False,
                ctx.scale,
            )
            if grads[0] is not None:
                grads[0] = grads[0] + _unstack(to_query, query)
            grads[3:] = to_key[0], to_value[0]
        return (*(g if n else None for g, n in zip(grads, needs, strict=True)), None, None, None, None)


def _stack(tensor: Tensor, heads: int) -> Tensor:
    """`[B, K * G, S, D]` to `[1, K, B * S * G, D]`: all queries of a key head in one row."""
    grouped = tensor.unflatten(1, (heads, -1)).permute(1, 0, 3, 2, 4)  # K B S G D
    return grouped.reshape(1, heads, -1, tensor.shape[-1])


def _unstack(tensor: Tensor, query: Tensor) -> Tensor:
    """The way back: `[1, K, B * S * G, D]` to `[B, K * G, S, D]`."""
    batch, heads, length, _ = query.shape
    grouped = tensor[0].unflatten(1, (batch, length, heads // tensor.shape[1]))  # K B S G D
    return grouped.permute(1, 0, 3, 2, 4).flatten(1, 2)
