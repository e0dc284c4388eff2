"""Carry a prompt's gradient past reentrant checkpoints.

A reentrant checkpoint runs a backward of its own for every layer. Were the layers' prefixes parts of one graph,
the second layer would meet it freed ("backward through the graph a second time"). So layers see leaves; their
gradients gather there, and enter the encoder's graph once, when the backward has come down to the embeddings.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_ptune.errors import InjectionError


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaves: list[Tensor], embeds: Tensor, *encoded: Tensor) -> Tensor:
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise InjectionError(
                "gradients of gradients (create_graph=True) do not pass reentrant checkpoints; take "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        gathered = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return None, grads[0], *gathered


def bridge(encoded: list[Tensor]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Put leaves between an encoded prompt and the layers that use it.

    Args:
        encoded: the prefix's tensors, parts of the encoder's graph.

    Returns:
        A leaf for every encoded tensor, and the function through which the input embeddings have to go: first in
        the forward pass, and so last in the backward.
    """
    leaves = [t.detach().requires_grad_() for t in encoded]

    def cross(embeds: Tensor) -> Tensor:
        crossed: Tensor = _Bridge.apply(leaves, embeds, *encoded)  # type: ignore[no-untyped-call]
        return crossed

    return leaves, cross


def checkpoint_layers(body: nn.Module) -> list[nn.Module]:
    """Modules of a body that can run under checkpoints; to walk all modules takes longer than a layer."""
    return [m for m in body.modules() if hasattr(m, "gradient_checkpointing")]


def reentrant_layers(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Those among layers that run under reentrant checkpoints while they train."""
    for module in layers:
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if reentrant and getattr(module, "gradient_checkpointing", False):
            yield module


@contextmanager
def without_checkpointing(layers: list[nn.Module]) -> Iterator[None]:
    """Run layers without their checkpoints for a while."""
    # a reentrant checkpoint keeps no graph of what it computes; the prompt's own pass is short
    stopped = [m for m in layers if getattr(m, "gradient_checkpointing", False)]
    for module in stopped:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in stopped:
            module.gradient_checkpointing = True  # type: ignore[assignment]
