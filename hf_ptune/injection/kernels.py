"""Fused attention kernels that tell their log-sum-exp, and take another one in their backward.

They are private operators of torch, so that each is compared with plain attention, outputs and gradients, before
its first use on a device and in a type; one that is absent, refuses or differs is not used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import logging

from hf_ptune.errors import DEVICE_FAILURES

logger = logging.get_logger(__name__)
_ROW = 16  # the length of a mask's rows in memory is a multiple of it, as CUDA's kernels want
_ATEN: Any = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """One fused attention.

    Args:
        forward: `(query, key, value, additive mask, causal, scale)` to the output `[B, H, S, D]` and the
            log-sum-exp of the scores `[B, H, S]`.
        backward: `(gradient, query, key, value, mask, output, log-sum-exp, causal, scale)` to three gradients.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_chosen: dict[tuple[str, torch.dtype, int], Kernel | None] = {}


def kernel_for(device: str, dtype: torch.dtype, width: int) -> Kernel | None:
    """The kernel of a device type for tensors of a type and a head width, or `None`."""
    key = (device, dtype, width)
    if key not in _chosen:
        kernel = _KERNELS.get(device)
        if kernel is None or torch.compiler.is_compiling():
            return None  # what has not been compared is not compiled in
        difference = _difference(kernel, device, dtype, width)
        _chosen[key] = None if difference else kernel
        if difference:
            logger.warning_once(
                f"the attention kernel of {device} in {dtype} with heads of {width} is not used for shared "
                f"prefixes ({difference}); they are copied for every row instead."
            )
    return _chosen[key]


def _difference(kernel: Kernel, device: str, dtype: torch.dtype, width: int) -> str | None:
    """How a kernel differs from plain attention, or `None`."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, width, generator=generator, device="cpu").to(device, dtype)

    tolerance = 1e-9 if dtype == torch.float64 else 1e-3 if dtype == torch.float32 else 5e-2
    try:
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            query, key, value, grad = draw(4, 17), draw(2, 17), draw(2, 17), draw(4, 17)
            hidden = torch.rand(2, 1, 17, 17, generator=generator, device="cpu") < 0.3
            hidden[..., 0] = False  # the log-sum-exp of a query that sees nothing is lost to rounding
            mask = (
                torch.zeros(2, 1, 17, 17, dtype=dtype, device="cpu")
                .masked_fill(hidden, torch.finfo(dtype).min)
                .to(device)
            )
            for additive, causal in ((None, False), (None, True), (mask, False)):
                output, lse = kernel.forward(query, key, value, additive, causal, width**-0.5)
                found = (
                    output,
                    lse,
                    *kernel.backward(grad, query, key, value, additive, output, lse, causal, width**-0.5),
                )
                expected = _plain(query, key, value, grad, additive, causal)
                for ours, plain in zip(found, expected, strict=True):
                    if not torch.allclose(ours.to(plain.dtype), plain, rtol=tolerance, atol=tolerance):
                        return "it differs from plain attention"
    except DEVICE_FAILURES:
        raise
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _plain(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, additive: Tensor | None, causal: bool
) -> tuple[Tensor, ...]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    # what it saves is no matter for a checkpoint around the layer that runs first
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        leaves = [t.detach().to(exact).requires_grad_() for t in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in leaves[1:])
        scores = leaves[0] @ keys.mT * query.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if additive is not None:
            scores = scores + additive.to(exact)
        output = scores.softmax(-1) @ values
        gradients = torch.autograd.grad(output, leaves, grad.to(exact))
    return (output.detach(), scores.detach().logsumexp(-1), *gradients)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return output, lse


def _cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    to_query, to_key, to_value = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return to_query, to_key, to_value


# On CUDA: flash attention where it serves (half precision, no mask), else memory-efficient attention, whose
# log-sum-exp comes in rows of a multiple of 32 and whose mask wants rows of a multiple of `_ROW`.


def _is_flash(query: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0


def _repeat(tensor: Tensor, like: Tensor) -> Tensor:
    groups = like.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def _sum_groups(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.shape[1] == like.shape[1] else tensor.unflatten(1, (like.shape[1], -1)).sum(2)


def in_rows(mask: Tensor) -> Tensor:
    """The same mask `[.., S, T]`, its rows apart in memory as CUDA's kernels want them."""
    rest = -mask.shape[-1] % _ROW
    if not rest or (mask.stride(-2) > 0 and mask.stride(-2) % _ROW == 0):
        return mask
    return F.pad(mask, (0, rest))[..., :-rest]


def _aligned(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return in_rows(mask).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    key, value = _repeat(key, query), _repeat(value, query)
    if _is_flash(query, mask):
        output, lse = _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]
        return output, lse
    output, lse = _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, _aligned(mask, query, key), True, 0.0, causal, scale=scale
    )[:2]
    return output, lse[..., : query.shape[2]]


def _cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _repeat(key, query), _repeat(value, query)
    lengths = (query.shape[2], key.shape[2])
    lse = lse.contiguous()
    if _is_flash(query, mask):
        unused = torch.zeros(2, dtype=torch.long, device=query.device).view(torch.uint64)  # of a dropout of zero
        to_query, to_key, to_value = _ATEN._scaled_dot_product_flash_attention_backward(
            grad, query, keys, values, output, lse, None, None, *lengths, 0.0, causal, unused, unused, scale=scale
        )
    else:
        lse = F.pad(lse, (0, -lengths[0] % 32), value=torch.inf)
        seed = torch.zeros((), dtype=torch.long, device=query.device)
        to_query, to_key, to_value, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            grad,
            query,
            keys,
            values,
            _aligned(mask, query, keys),
            output,
            lse,
            seed,
            seed,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
    return to_query, _sum_groups(to_key, key), _sum_groups(to_value, value)


_KERNELS = {"cpu": Kernel(_cpu_forward, _cpu_backward), "cuda": Kernel(_cuda_forward, _cuda_backward)}
