"""Attention of all rows of a batch over one prefix.

On the CPU plain matrix products beat the fused kernel, which cuts queries into small blocks for the sake of masks
that a prefix does not have; they run in pieces, so that scores take a fixed amount of memory. Elsewhere, and in
half precision, the fused kernel meets the queries of all rows as one row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_ptune.injection.kernels import Kernel

_SCORES = 2**20  # values of one piece of scores, small enough to stay in a cache


def shared_forward(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend over a prefix.

    Args:
        kernel: the fused kernel of the device.
        query: `[B, H, S, D]`.
        key: `[K, P, D]`.
        value: `[K, P, D]`.
        scale: of the scores.

    Returns:
        The output `[B, H, S, D]` and the log-sum-exp of the scores `[B, H, S]`.
    """
    if not _by_products(query):
        stacked = kernel.forward(_stack(query), key[None], value[None], None, False, scale)
        return _unstack(stacked[0], query), _unstack(stacked[1], query)
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch * length, heads, value.shape[-1])
    lse = query.new_empty(batch * length, heads)
    rows = _rows(query)
    scaled = (key * scale).mT
    for piece in _pieces(rows, key):
        scores = torch.bmm(_by_key_head(rows[piece], key), scaled)  # K N*G P
        highest = scores.amax(-1, keepdim=True)
        total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
        _put(output[piece], torch.bmm(scores, value).div_(total))
        _put(lse[piece][..., None], total.log_().add_(highest))
    return _unstack(output.transpose(0, 1)[None], query), _unstack(lse.transpose(0, 1)[None], query)


def shared_backward(
    kernel: Kernel, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a prefix's share in an attention.

    Args:
        kernel: the fused kernel of the device.
        grad: of the whole output, `[B, H, S, D]`.
        query: `[B, H, S, D]`.
        key: `[K, P, D]`.
        value: `[K, P, D]`.
        output: of the whole attention, `[B, H, S, D]`.
        lse: of the whole attention, `[B, H, S]`.
        scale: of the scores.

    Returns:
        What the queries `[B, H, S, D]` get from here, and the gradients of key and value `[K, P, D]`.
    """
    if not _by_products(query):
        stacked = [_stack(t) for t in (grad, query, output, lse)]
        to_query, to_key, to_value = kernel.backward(
            *stacked[:2], key[None], value[None], None, *stacked[2:], False, scale
        )
        return _unstack(to_query, query), to_key[0], to_value[0]
    rows, grads = _rows(query), _rows(grad)
    delta = (grads * _rows(output)).sum(-1, keepdim=True)
    lses = _rows(lse[..., None])
    to_query = torch.empty_like(rows, memory_format=torch.contiguous_format)
    to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
    scaled = key * scale
    for piece in _pieces(rows, key):
        queries, outer = _by_key_head(rows[piece], key), _by_key_head(grads[piece], key)
        shares = torch.bmm(queries, scaled.mT).sub_(_by_key_head(lses[piece], key)).exp_()  # K N*G P
        to_value.baddbmm_(shares.mT, outer)
        to_scores = torch.bmm(outer, value.mT).sub_(_by_key_head(delta[piece], key)).mul_(shares)
        to_key.baddbmm_(to_scores.mT, queries, alpha=scale)
        _put(to_query[piece], torch.bmm(to_scores, scaled))
    return _unstack(to_query.transpose(0, 1)[None], query), to_key, to_value


def shared_product(rows: Tensor, shared: Tensor) -> Tensor:
    """Multiply `[B, H, S, N]` with one `[K, N, M]` for all rows: `[B, H, S, M]`."""
    heads, groups = shared.shape[0], rows.shape[1] // shared.shape[0]
    stacked = rows.unflatten(1, (heads, groups)).transpose(0, 1).reshape(heads, -1, rows.shape[-1])  # K B*G*S N
    product = torch.bmm(stacked, shared).unflatten(1, (rows.shape[0], groups, rows.shape[2]))
    return product.transpose(0, 1).flatten(1, 2)


def _by_products(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)


def _rows(tensor: Tensor) -> Tensor:
    """`[B, H, S, D]` to `[B * S, H, D]`, a view of what layers give."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _stack(tensor: Tensor) -> Tensor:
    """`[B, H, S, ...]` to `[1, H, B * S, ...]`: the queries of all rows in one."""
    return tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _unstack(tensor: Tensor, query: Tensor) -> Tensor:
    """The way back: `[1, H, B * S, ...]` to `[B, H, S, ...]`."""
    return tensor[0].transpose(0, 1).unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _pieces(rows: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, _SCORES // (rows.shape[1] * key.shape[1]))
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


def _by_key_head(rows: Tensor, key: Tensor) -> Tensor:
    """`[N, H, D]` to `[K, N * G, D]`: beside each key head the G queries that share it."""
    heads = key.shape[0]
    return rows.unflatten(1, (heads, -1)).transpose(0, 1).reshape(heads, -1, rows.shape[-1])


def _put(rows: Tensor, values: Tensor) -> None:
    """Write `[K, N * G, D]` into `[N, H, D]`."""
    heads, count = values.shape[0], rows.shape[0]
    rows.unflatten(1, (heads, -1)).copy_(values.unflatten(1, (count, -1)).transpose(0, 1))
