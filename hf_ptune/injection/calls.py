"""How a module is called: the arguments that its forward takes, those of one call by name, and whether they changed."""

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_ptune.injection.interrupts import OnInterrupt

_CACHE_NAMES = ("cache", "past_key_values")  # the second one before transformers 5.24


@functools.lru_cache(maxsize=512)
def _without_self(function: Any) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _forward_of(module: nn.Module) -> inspect.Signature:
    forward: Any = module.forward
    while isinstance(forward, OnInterrupt):
        forward = forward.__wrapped__
    if hasattr(forward, "__func__"):
        return _without_self(forward.__func__)
    return inspect.signature(forward)  # replaced on the instance, such as by a device map


def parameters_of(module: nn.Module) -> set[str]:
    """Names of the arguments that a module's forward takes."""
    return set(_forward_of(module).parameters)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a forward call."""
    if not args:
        return dict(kwargs)
    signature = _forward_of(module)
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def cache_of(named: dict[str, Any]) -> Any:
    """The cache of earlier keys and values that a call goes on from, or `None`."""
    return next((named[name] for name in _CACHE_NAMES if named.get(name) is not None), None)


def cache_name(module: nn.Module) -> str | None:
    """What a module's forward calls such a cache; `None` where it takes none."""
    taken = parameters_of(module)
    return next((name for name in _CACHE_NAMES if name in taken), None)


def this_thread() -> int:
    """What tells the calls of one module apart that run at the same time; compiled code runs in one thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def transformed() -> bool:
    """Whether a transform of torch.func runs around the call: fused kernels, and what is kept, are not for it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class Slot:
    """What one hook leaves for another of the same pass, apart for threads."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": {}}  # a copy has no part in passes that are going on

    def put(self, value: Any) -> None:
        """Leave something, in the place of what a pass that went down has left."""
        self.kept[this_thread()] = value

    def look(self) -> Any:
        """What was left; `None` where nothing was. Eager code sees what compiled code around it has left."""
        return self.kept.get(self._here())

    def take(self) -> Any:
        """The same, once."""
        return self.kept.pop(self._here(), None)

    def _here(self) -> int:
        here = this_thread()
        return here if here in self.kept else 0


class Threads:
    """Threads in which something runs; true in those."""

    def __init__(self) -> None:
        self.running: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"running": set()}  # what runs does not run in a copy

    def enter(self) -> None:
        """Let it run here."""
        self.running.add(this_thread())

    def leave(self) -> None:
        """Let it run here no more, compiled or not."""
        self.running -= {0, this_thread()}

    @contextmanager
    def here(self) -> Iterator[None]:
        """Let it run here for a while."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def __bool__(self) -> bool:
        # compiled code runs in one thread, and does not ask which
        if not self.running or torch.compiler.is_compiling():
            return bool(self.running)
        return not self.running.isdisjoint((0, threading.get_ident()))


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written; one made in inference mode does not count that."""
    return -1 if tensor.is_inference() else tensor._version
