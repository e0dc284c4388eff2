"""The dropout of a frozen backbone, taken out while a prompt trains in front of it, and put back."""

import dis
import functools
import inspect
import itertools
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_NAMED = "drop"


class BackboneDropout:
    """Hold the dropout of a body: probabilities of its dropout modules, and what its own functions draw by.

    In a few epochs, dropout in front of which nothing trains is little but noise on the states that a prompt works
    through; in many it keeps the prompt from fitting its rows too well. The papers' scripts keep it.

    Args:
        body: the backbone without its head, whose own dropout stays.
        kept: whether it is left alone.
    """

    def __init__(self, body: nn.Module, kept: bool = False) -> None:
        self.body = body
        self.kept = kept
        self.taken: list[tuple[nn.Module, str, Any]] = []  # what stood where

    def follow(self, training: bool) -> None:
        """Set every probability to zero for training, else to what it was."""
        if self.kept or (training and self.taken):
            return
        if training:
            for module in self.body.modules():
                for name, value, still in [*_probabilities(module), *_asked(module)]:
                    self.taken.append((module, name, value))
                    setattr(module, name, still)
            return
        taken, self.taken = self.taken, []
        for module, name, value in taken:
            setattr(module, name, value)


class _Still:
    """A configuration but for probabilities that are asked for while a pass runs, which are zero.

    It stands in one module's place of it; the configuration that is saved says what it said.
    """

    def __init__(self, config: Any, names: list[str]) -> None:
        vars(self).update(_config=config, _names=names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is being made has nothing yet
            raise AttributeError(name)
        return 0.0 if name in self._names else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def _probabilities(module: nn.Module) -> list[tuple[str, float, float]]:
    """Names and values of what a module drops by, where that is more than zero (layers dropped whole included)."""
    held: dict[str, Any] = vars(module)
    dropout = isinstance(module, _DropoutNd)
    names = [n for n in held if _NAMED in n or (dropout and n == "p")]
    return [(n, held[n], 0.0) for n in names if isinstance(held[n], float) and held[n] > 0]


def _asked(module: nn.Module) -> list[tuple[str, Any, _Still]]:
    """The configuration of a module whose forward asks it for probabilities (Falcon, Persimmon, ProphetNet)."""
    config: Any = vars(module).get("config")
    family: Any = type(module)
    names = [] if config is None else [n for n in _asked_for(family) if getattr(config, n, None)]
    return [("config", config, _Still(config, names))] if names else []


@functools.lru_cache(maxsize=512)
def _asked_for(family: Any) -> list[str]:
    forward = inspect.unwrap(family.forward)
    steps = dis.get_instructions(forward) if hasattr(forward, "__code__") else ()
    pairs = itertools.pairwise(step.argval for step in steps)
    return sorted({name for before, name in pairs if before == "config" and isinstance(name, str) and _NAMED in name})
