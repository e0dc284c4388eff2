"""Attention over a prefix that all rows share, of which no row keeps a copy.

Attention over [prefix | own tokens] is attention over either part, weighted by the log-sum-exps of their scores.
The queries of all rows meet the prefix in one call of batch 1, so that its keys and values, and their gradients,
exist once. Backward needs no more than the kernels offer: given the merged output and log-sum-exp, the backward of
either part is that of its share (the identity behind ring attention).

The CPU's kernel is faster over one longer row of keys than over two. There a short prefix is laid before the own
keys of each row for the length of one call, forward or backward; what is kept for the backward stays shared. A GPU
waits for what launches its kernels, of which a merge has more: there a short prefix is copied before every row, and
attention left to torch.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ptune.injection.calls import transformed, version_of
from hf_ptune.injection.kernels import Kernel, in_rows, kernel_for
from hf_ptune.injection.shared_prefix import shared_backward, shared_forward

_disabled = False
_COPY = 32 * 2**20  # bytes that one call may lay out for the sake of a prefix
_KEPT = 4 * 2**20  # bytes of prefix that a layer may keep for the backward, on a GPU
_causal_mask: "weakref.ref[Tensor] | None" = None  # the last one; kept alive by the pass, or by what it has saved
_passing = threading.local()


@contextmanager
def concatenated_attention() -> Iterator[None]:
    """Attend over copies of the prefix before every row, as the reference that the merge is compared with."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def keep_masks(on: bool) -> None:
    """Keep, until told not to, the causal mask that a layer makes for the layers behind it in this thread's pass."""
    if not torch.compiler.is_compiling():
        _passing.on, _passing.mask = on, None
        _passing.token = object() if on else None


def merge_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool, dropout: float, virtual: int
) -> Kernel | None:
    """The kernel that merges, or `None` where the prefix has to be concatenated.

    Args:
        query: `[B, H, S, D]`.
        key: own keys `[B, K, T, D]`.
        value: own values; another width than the keys' is concatenated.
        mask: boolean or additive `[.., S, T]`, or `None`; one with a gradient is concatenated.
        causal: whether a query sees the own keys up to its own place, where there is no mask.
        dropout: of the probabilities; the kernels of some devices take none.
        virtual: P, the length of the prefix.
    """
    alike = query.dim() == 4 and query.shape[0] == key.shape[0] and key.shape[-1] == value.shape[-1]
    if _disabled or dropout or not _is_plain(mask) or not alike or query.shape[1] % key.shape[1] or transformed():
        return None
    if torch.compiler.is_exporting():
        return None  # other runtimes take these kernels with as many heads of keys as of queries alone
    # compiled, these kernels have been seen to give a prefix no gradient on a GPU
    if query.device.type != "cpu" and (
        torch.compiler.is_compiling() or _copies_little(query, key, mask, causal, virtual)
    ):
        return None
    return kernel_for(query.device.type, _working_type(query), query.shape[-1])


def _copies_little(query: Tensor, key: Tensor, mask: Any, causal: bool, virtual: int) -> bool:
    """Whether copies of a prefix before every row, and what comes of them, are small beside what a GPU has."""
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1], virtual + key.shape[2]
    token = 2 * rows * width * query.element_size()  # of a key head
    copies = token * key_heads * virtual
    masked = queries > 1 and (mask is not None or causal)
    # a step of generation lays out its whole cache; under a mask keys are repeated for the heads that share them
    laid = token * keys * (key_heads if queries == 1 else heads - key_heads if masked else 0)
    made = queries * keys * query.element_size() if masked and mask is None else 0
    return copies <= _KEPT and max(copies + laid, made) <= _COPY


def mask_beside_prefix(query: Tensor, mask: Any, keys: int, virtual: int, causal: bool) -> Tensor | None:
    """The mask of attention over [prefix | own tokens], made once for all layers that share the own one.

    Args:
        query: `[B, H, S, D]`.
        mask: over own keys, boolean or additive `[.., S, T]`, or `None`.
        keys: T.
        virtual: P.
        causal: whether a query sees the own keys up to its own place, where there is no mask; S is T then.

    Returns:
        An additive one `[.., S, P + T]`, or `None` where another way has to be taken.
    """
    if _disabled or not _is_plain(mask) or (mask is None and not (causal and keys == query.shape[2])):
        return None
    if transformed():
        return None
    dtype = _working_type(query)
    if mask is None:
        return _causal(keys, virtual, dtype, query.device)
    return _additive(mask, dtype, query.shape[2], keys, virtual)


def _is_plain(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and not mask.requires_grad and mask.dim() in (2, 4))


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
    tensors: list[Any] = [t.to(dtype) for t in (query, key, value, prefix_key, prefix_value)]
    joins = _fits(query, prefix_key, prefix_value, key.shape[0])
    before = prefix_key.shape[1] if joins else 0
    additive = None if mask is None else _additive(mask, dtype, query.shape[2], key.shape[2], before)
    if joins and causal:
        additive, causal = _causal(query.shape[2], before, dtype, query.device), False
    how: tuple[Any, ...] = (additive, causal, query.shape[-1] ** -0.5 if scale is None else scale, kernel)
    function: Any = _Joined if joins else _Merged
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        output: Tensor = function.apply(*tensors, *how)
        return output
    attended: Tensor = function.compute(*tensors, *how)[0]
    return attended


def _fits(query: Tensor, key: Tensor, value: Tensor, rows: int) -> bool:
    size = rows * (key.numel() + value.numel()) * query.element_size()
    return query.device.type == "cpu" and query.shape[2] > 1 and size <= _COPY


def _working_type(query: Tensor) -> torch.dtype:
    # the kernels are called below the level at which autocast casts
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def _causal(queries: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An additive mask `[1, 1, S, P + S]` that shows every query the prefix and the own keys up to its place."""
    global _causal_mask
    kept = None if _causal_mask is None or torch.compiler.is_compiling() else _causal_mask()
    shape = (1, 1, queries, before + queries)
    if kept is not None and kept.is_inference() and torch.is_grad_enabled():
        kept = None  # it cannot be kept for a backward pass
    if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, device):
        hidden = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        kept = _for_kernels(hidden.triu(before + 1))
        if not torch.compiler.is_compiling():
            _causal_mask = weakref.ref(kept)
    if not torch.compiler.is_compiling() and getattr(_passing, "on", False):
        _passing.mask = kept
    return kept


def _additive(mask: Tensor, dtype: torch.dtype, queries: int, keys: int, before: int) -> Tensor:
    """Read a mask once for all layers that share it, with `before` visible columns before it.

    Hidden keys get the lowest finite number: a query that sees none of them then keeps a finite log-sum-exp, and
    its own share vanishes beside the prefix's.
    """
    if torch.compiler.is_compiling():
        return _read(mask, dtype, queries, keys, before)
    kept: Any = mask.__dict__.get("_ptune_additive")
    version: Any = version_of(mask)
    if mask.is_inference():  # it does not count its changes, but has none while a pass runs
        version = getattr(_passing, "token", None)
        if version is None:
            return _read(mask, dtype, queries, keys, before)
    # what inference mode has made cannot be kept for a backward pass
    of = (version, torch.is_inference_mode_enabled(), dtype, queries, keys, before)
    if kept is None or kept[0] != of:
        kept = mask.__dict__["_ptune_additive"] = (of, _read(mask, dtype, queries, keys, before))
    additive: Tensor = kept[1]
    return additive


def _read(mask: Tensor, dtype: torch.dtype, queries: int, keys: int, before: int) -> Tensor:
    lowest = torch.finfo(dtype).min
    seen = mask[..., :keys]
    if seen.dtype == torch.bool:
        additive = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, lowest)
    else:
        additive = seen.to(dtype).clamp(min=lowest)
    return _for_kernels(F.pad(additive, (before, 0))).expand(*additive.shape[:-2], queries, before + keys)


def _for_kernels(mask: Tensor) -> Tensor:
    return mask if mask.device.type == "cpu" else in_rows(mask)


class _Merged(torch.autograd.Function):
    """Two calls, merged."""

    @staticmethod
    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        additive: Tensor | None,
        causal: bool,
        scale: float,
        kernel: Kernel,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, own_lse = kernel.forward(query, key, value, additive, causal, scale)
        shared, shared_lse = shared_forward(kernel, query, prefix_key, prefix_value, scale)
        share = torch.sigmoid(shared_lse - own_lse)[..., None]
        # half precision is merged in the precision of the log-sum-exp
        output = own.to(share.dtype).lerp_(shared.to(share.dtype), share).to(own.dtype)
        return output, own_lse, shared_lse

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output, own_lse, shared_lse = _Merged.compute(*args)
        return _keep(ctx, args, output, torch.logaddexp(own_lse, shared_lse))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if _differentiates_again():
            return _plain_backward(ctx, grad)
        query, key, value, prefix_key, prefix_value, additive, output, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        grads: list[Tensor | None] = [None] * 5
        if any(needs[:3]):
            grads[:3] = ctx.kernel.backward(grad, query, key, value, additive, output, lse, ctx.causal, ctx.scale)
        if needs[0] or any(needs[3:]):
            to_query, *grads[3:] = shared_backward(
                ctx.kernel, grad, query, prefix_key, prefix_value, output, lse, ctx.scale
            )
            if grads[0] is not None:
                grads[0] += to_query
        return _needed(ctx, grads)


class _Joined(torch.autograd.Function):
    """One call over keys and values that are laid side by side for its length."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor]:
        query, key, value, prefix_key, prefix_value, additive, causal, scale, kernel = args
        keys, values = lay(prefix_key, key), lay(prefix_value, value)
        output, lse = kernel.forward(query, keys, values, additive, causal, scale)
        return output, lse

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _keep(ctx, args, *_Joined.compute(*args))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if _differentiates_again():
            return _plain_backward(ctx, grad)
        query, key, value, prefix_key, prefix_value, additive, output, lse = ctx.saved_tensors
        keys, values = lay(prefix_key, key), lay(prefix_value, value)
        to_query, to_keys, to_values = ctx.kernel.backward(
            grad, query, keys, values, additive, output, lse, ctx.causal, ctx.scale
        )
        sizes = [prefix_key.shape[1], key.shape[2]]
        (to_prefix_key, to_key), (to_prefix_value, to_value) = (t.split(sizes, 2) for t in (to_keys, to_values))
        return _needed(ctx, [to_query, to_key, to_value, to_prefix_key.sum(0), to_prefix_value.sum(0)])


def _keep(ctx: Any, args: tuple[Any, ...], output: Tensor, lse: Tensor) -> Tensor:
    """Keep for the backward what went in and what came out."""
    *tensors, causal, scale, kernel = args
    ctx.save_for_backward(*tensors, output, lse)
    ctx.causal, ctx.scale, ctx.kernel = causal, scale, kernel
    return output


def _differentiates_again() -> bool:
    """Whether the backward that runs is to be differentiated itself: `create_graph`, which no fused kernel can."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _plain_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients by products and a softmax, which have gradients of their own."""
    *saved, additive, _, _ = ctx.saved_tensors
    # gradients of the call's own arguments, whether or not one of them comes from another
    tensors = [t.view_as(t) for t in saved]
    how: tuple[Any, ...] = (additive, ctx.causal, ctx.scale)
    with torch.autocast(grad.device.type, enabled=False):
        output = _attend(*tensors, *how)
        wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[:5], strict=True) if needed]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return _needed(ctx, [next(found) if needed else None for needed in ctx.needs_input_grad[:5]])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    additive: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention over copies of the prefix before every row, as `compute` gives it, with all scores at once."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        lay(prefix, own).repeat_interleave(groups, 1) for prefix, own in ((prefix_key, key), (prefix_value, value))
    )
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ keys.mT).to(exact) * scale  # B H S P+T
    if additive is not None:
        scores = scores + F.pad(additive, (scores.shape[-1] - additive.shape[-1], 0))
    if causal:
        later = torch.ones(scores.shape[-2], key.shape[2], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(F.pad(later, (prefix_key.shape[1], 0)), -torch.inf)
    return scores.softmax(-1).to(query.dtype) @ values


def _needed(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of the five tensors that need one; mask, causality, scale and kernel have none."""
    needs = ctx.needs_input_grad[:5]
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), None, None, None, None)


def lay(prefix: Tensor, own: Tensor) -> Tensor:
    """Put a shared prefix `[K, P, D]` before each row of `[B, K, T, D]`."""
    return torch.cat([prefix.expand(own.shape[0], *prefix.shape), own], dim=2)
