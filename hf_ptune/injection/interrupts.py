"""What a pass that is interrupted leaves: torch calls hooks that are always called for errors, not for Ctrl-C."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class OnInterrupt:
    """Stand before a module's forward, and clean up after what is raised in it and is no `Exception`.

    Args:
        module: its forward may stand on the instance, where a device map has put another one.
        clean: takes away what its hooks have left.
        begin: called as its forward begins, past all hooks before it, which may be interrupted too.
    """

    def __init__(self, module: nn.Module, clean: Callable[[], Any], begin: Callable[[], Any] | None = None) -> None:
        self.module = module
        self.clean = clean
        self.begin = begin
        self.inner: Any = module.__dict__.get("forward")  # None: that of its class, which no pickle has to find again
        module.__dict__["forward"] = self

    @property
    def __wrapped__(self) -> Any:
        """The forward behind this one, whose arguments are taken."""
        return type(self.module).forward.__get__(self.module) if self.inner is None else self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # a bound method would be looked up on the module again where a graph breaks, and this be found
        forward, args = (type(self.module).forward, (self.module, *args)) if self.inner is None else (self.inner, args)
        if self.begin is not None:
            self.begin()
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        try:
            return forward(*args, **kwargs)
        except Exception:  # for these torch calls the hooks that are always called
            raise
        except BaseException:
            self.clean()
            raise

    def remove(self) -> None:
        """Give the module its forward back."""
        held = self.module.__dict__
        before = held.get("forward")
        if before is self:
            held["forward"] = self.inner
            if self.inner is None:
                del held["forward"]
            return
        while isinstance(before, OnInterrupt):
            if before.inner is self:
                before.inner = self.inner
                return
            before = before.inner
        self.clean, self.begin = _nothing, None  # what stands before it now keeps it


def _nothing() -> None:
    pass
