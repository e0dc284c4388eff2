"""Forward and backward hooks that others have put on a base: they are called for the rows of a call, and for no more.

Prompts and trials run through the same modules. Hooks that steer or collect would take them for rows, and would take
a prompt and its rows in one sequence for one row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# packages whose hooks are how a base runs: where its weights come from, what else is asked of it
_RUNNERS = {"hf_ptune", "torch", "transformers", "accelerate", "deepspeed", "peft"}
_returns = 0  # how often hooks that were set aside have come back


class Lookout:
    """Tell whether outsiders have hooks in a body; modules are walked anew only where hooks have been put since.

    Args:
        body: the modules that a prompt and its rows run through in one sequence.
        apart: one of them that meets rows alone.
    """

    def __init__(self, body: nn.Module, apart: nn.Module | None) -> None:
        self.body = body
        self.apart = apart
        self.none_since: tuple[int, int] | None = None  # hooks that have been put or have come back, till then

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"none_since": None}  # hooks are counted by each process

    def sees(self) -> bool:
        """Whether there is one now; compiled code has those in it that were there when it was compiled."""
        if torch.compiler.is_compiling():
            return False
        count = RemovableHandle.next_id, _returns
        if self.none_since == count:
            return False
        found = any(_outside(hooks) for hooks in _hooks(m for m in self.body.modules() if m is not self.apart))
        self.none_since = None if found else count
        return found


@contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """Let a module run for a while without the hooks of outsiders; they come back in their places."""
    global _returns
    taken = []
    for hooks in _hooks(module.modules()):
        if numbers := _outside(hooks):
            taken.append((hooks, dict(hooks), numbers))
            for number in numbers:
                del hooks[number]
    try:
        yield
    finally:
        _returns += bool(taken)
        for hooks, before, numbers in taken:
            came = {n: h for n, h in hooks.items() if n not in before}
            kept = {n: h for n, h in before.items() if n in hooks or n in numbers}
            hooks.clear()
            hooks.update(kept | came)


def _hooks(modules: Iterator[nn.Module]) -> Iterator[dict[int, Any]]:
    """The hooks of each kind of each module, by number, and those of all modules."""
    for kind in _KINDS:
        yield getattr(torch_modules, f"_global{kind}")
    for module in modules:
        held = module.__dict__
        for kind in _KINDS:
            if hooks := held.get(kind):
                yield hooks


def _outside(hooks: dict[int, Any]) -> list[int]:
    return [number for number, hook in hooks.items() if _package(hook) not in _RUNNERS]


def _package(hook: Callable[..., Any]) -> str:
    """The package in which a hook is written."""
    hook = getattr(hook, "func", hook)  # of a partial one
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return str(home).partition(".")[0]
