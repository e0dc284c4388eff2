"""Let checkpointed layers run again, in the backward, with the prefixes of the pass that they first ran in.

Sites hold the prefixes of the latest pass. Another one, of a second loss or without the prompt, may lie between a
pass and its backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_ptune.injection.sites import Site, site_of

_OF_LAYERS = "_gradient_checkpointing_func"
_OF_WRAPPERS = "checkpoint_fn"  # torch's modules around a layer, as FSDP's activation checkpointing puts them


class Recomputation:
    """Stand for a layer's checkpoint function while a pass runs.

    Args:
        name: path of the layer in its body.
        layer: what runs under the checkpoint.
        sites: those in it.
    """

    def __init__(self, name: str, layer: nn.Module, sites: list[Site]) -> None:
        self.name = name
        self.layer = layer
        self.sites = sites
        self.place = ""
        self.function: Callable[..., Any] | None = None  # the layer's own

    def stands_in(self, body: nn.Module) -> bool:
        """Whether the layer is still where it was, and not in a wrapper that an engine has put there."""
        found: Any = body
        for part in filter(None, self.name.split(".")):
            found = getattr(found, part, None)
        return found is self.layer

    def begin(self) -> bool:
        """Take the place of the layer's function, if the layer runs under one; whether it does."""
        held = self.layer.__dict__
        checkpoints = self.layer.training and getattr(self.layer, "gradient_checkpointing", False)
        self.place = _OF_WRAPPERS if _OF_WRAPPERS in held else _OF_LAYERS if checkpoints else ""
        if self.place not in held:
            return False
        held[self.place], self.function = self, held[self.place]
        return True

    def end(self) -> None:
        """Give the layer its function back."""
        self.layer.__dict__[self.place], self.function = self.function, None

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


def recomputations(body: nn.Module) -> list[Recomputation]:
    """One for every module of a body that can run under checkpoints and has sites inside."""
    layers = ((n, m) for n, m in body.named_modules() if hasattr(m, "gradient_checkpointing"))
    inside = ((n, m, [s for part in m.modules() if (s := site_of(part)) is not None]) for n, m in layers)
    return [Recomputation(*found) for found in inside if found[2]]
