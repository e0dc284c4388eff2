"""Attention of all rows of a batch over one prefix: the fused kernel meets the queries of all rows as one row."""

import torch
from torch import Tensor

from hf_ptune.injection.kernels import Kernel


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
    output, lse = kernel.forward(_stack(query), key[None], value[None], None, False, scale)
    return _unstack(output, query), _unstack(lse, query)


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
    stacked = [_stack(t) for t in (grad, query, output, lse)]
    to_query, to_key, to_value = kernel.backward(*stacked[:2], key[None], value[None], None, *stacked[2:], False, scale)
    return _unstack(to_query, query), to_key[0], to_value[0]


def shared_product(rows: Tensor, shared: Tensor) -> Tensor:
    """Multiply `[B, H, S, N]` with one `[K, N, M]` for all rows: `[B, H, S, M]`."""
    heads, groups = shared.shape[0], rows.shape[1] // shared.shape[0]
    stacked = rows.unflatten(1, (heads, groups)).transpose(0, 1).reshape(heads, -1, rows.shape[-1])  # K B*G*S N
    product = torch.bmm(stacked, shared).unflatten(1, (rows.shape[0], groups, rows.shape[2]))
    return product.transpose(0, 1).flatten(1, 2)


def _stack(tensor: Tensor) -> Tensor:
    """`[B, H, S, ...]` to `[1, H, B * S, ...]`: the queries of all rows in one."""
    if tensor.shape[2] == 1:
        return tensor.transpose(0, 2)  # one step of generation: the same in one call
    return tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _unstack(tensor: Tensor, query: Tensor) -> Tensor:
    """The way back: `[1, H, B * S, ...]` to `[B, H, S, ...]`."""
    if query.shape[2] == 1:
        return tensor.transpose(0, 2)
    return tensor[0].transpose(0, 1).unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)
