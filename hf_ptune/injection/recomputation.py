"""Let checkpointed layers run again, in the backward, with the prefixes of the pass that they first ran in.

Sites hold the prefixes of the latest pass. Another one, of a second loss or without the prompt, may lie between a
pass and its backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_ptune.injection.sites import Site

_FUNCTION = "_gradient_checkpointing_func"


class Recomputation:
    """Stand for a layer's checkpoint function while a pass runs.

    Args:
        layer: what runs under the checkpoint.
        sites: those in it.
    """

    def __init__(self, layer: nn.Module, sites: Sequence[Site]) -> None:
        self.layer = layer
        self.sites = sites
        self.function: Callable[..., Any] | None = None  # the layer's own

    def begin(self) -> bool:
        """Take the place of the layer's function, if the layer runs under it; whether it does."""
        function = self.layer.__dict__.get(_FUNCTION)
        if function is None or not (self.layer.training and getattr(self.layer, "gradient_checkpointing", False)):
            return False
        self.layer.__dict__[_FUNCTION], self.function = self, function
        return True

    def end(self) -> None:
        """Give the layer its function back."""
        self.layer.__dict__[_FUNCTION], self.function = self.function, None

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.function is not None
        if torch.compiler.is_compiling():  # the graph holds its own prefixes
            return self.function(run, *args, **kwargs)
        pairs = [site.pair for site in self.sites]

        def again(*args: Any, **kwargs: Any) -> Any:
            before = [site.swap(pair) for site, pair in zip(self.sites, pairs, strict=True)]
            try:
                return run(*args, **kwargs)
            finally:
                for site, kept in zip(self.sites, before, strict=True):
                    site.restore(kept)

        return self.function(again, *args, **kwargs)


def recomputations(body: nn.Module, sites: Sequence[Site]) -> list[Recomputation]:
    """One for every module of a body that can run under checkpoints and has sites inside."""
    found = []
    for name, module in body.named_modules():
        inside = [s for s in sites if not name or f"{s.name}.".startswith(f"{name}.")]
        if inside and hasattr(module, "gradient_checkpointing"):
            found.append(Recomputation(module, inside))
    return found
