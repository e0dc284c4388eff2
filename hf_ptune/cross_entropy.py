"""Cross entropy over a large vocabulary that keeps the logits and one number a row, and no softmax."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that has no loss
_PIECE = 2**22  # logits that are exponentiated at a time: as many as a CPU's caches hold
_LARGE_PIECE = 2**25  # other devices wait for whoever launches a piece's kernels


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    **kwargs: Any,
) -> Tensor:
    """What transformers' `ForCausalLMLoss` gives: mean, or sum over a given count, of shifted labels.

    Args:
        logits: `[B, S, V]`.
        labels: `[B, S]`; those equal to `ignore_index` do not count.
        vocab_size: V.
        num_items_in_batch: what to divide the sum by; the number of labels that count when unset.
        ignore_index: see labels.
        kwargs: not used; transformers passes everything on.

    Returns:
        The loss, a scalar in float32.
    """
    shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return masked_lm_loss(logits, shifted, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    **kwargs: Any,
) -> Tensor:
    """What transformers' `ForMaskedLMLoss` gives; arguments and result are those of `causal_lm_loss`."""
    targets = labels.reshape(-1).to(logits.device)
    total: Tensor = _CrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


class _CrossEntropy(torch.autograd.Function):
    """Sum over rows of `[N, V]`, computed in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        counts = targets != ignored
        targets = targets.masked_fill(~counts, 0)
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for piece in _pieces(logits):
            torch.logsumexp(logits[piece].float(), -1, out=lse[piece])
        picked = logits.gather(1, targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, counts, lse)
        return (lse - picked).masked_fill(~counts, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, counts, lse = ctx.saved_tensors
        weights = counts * grad.float()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: to be differentiated again
            hits = F.one_hot(targets, logits.shape[1])
            return ((logits.float().softmax(-1) - hits) * weights[:, None]).to(logits.dtype), None, None
        negative, gradient = -weights, torch.empty_like(logits)
        for piece in _pieces(logits):
            shares = (logits[piece].float() - lse[piece, None]).exp_().mul_(weights[piece, None])
            gradient[piece] = shares.scatter_add_(1, targets[piece, None], negative[piece, None])
        return gradient, None, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    size = max(1, (_PIECE if logits.device.type == "cpu" else _LARGE_PIECE) // logits.shape[1])
    for start in range(0, len(logits), size):
        yield slice(start, start + size)
