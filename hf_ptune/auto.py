"""Make the classes known to transformers' Auto classes and pipelines, when those are first used.

Importing transformers loads neither torch nor a model; importing hf_ptune should not do so either. Its
modules register themselves as they are imported, and are imported right after the modules that they register with.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_FOLLOWS = {
    "transformers.models.auto.configuration_auto": "hf_ptune.configuration_ptune",
    "transformers.models.auto.tokenization_auto": "hf_ptune.tokenization",
    "transformers.models.auto.modeling_auto": "hf_ptune.modeling_ptune",
    "transformers.trainer": "hf_ptune.callbacks.model_card",
    "hf_ptune.modeling_ptune": "hf_ptune.interop",
}


# ours import theirs, which import each other: what is half imported has not yet what is asked of it
_HELD = ("hf_ptune.", "transformers.")
_waiting: list[str] = []
_running = 0  # modules of either that are being executed


class _Follower(MetaPathFinder):
    """Import our module after theirs, once no module of either package is half imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_HELD):
            return None
        finders: list[Any] = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        spec: ModuleSpec | None = next((s for f in finders if (s := f.find_spec(fullname, path, target))), None)
        loader: Any = spec and spec.loader
        # a finder that loads by itself serves many modules: transformers' of former names does
        if loader is not None and loader not in sys.meta_path:
            loader.exec_module = _then(loader.exec_module, fullname)
        return spec


def _then(execute: Callable[[ModuleType], None], name: str) -> Callable[[ModuleType], None]:
    def both(module: ModuleType) -> None:
        global _running
        _running += 1
        try:
            execute(module)
        finally:
            _running -= 1
        if name in _FOLLOWS:
            _waiting.append(_FOLLOWS[name])
        while _waiting and not _running:
            importlib.import_module(_waiting.pop(0))

    return both


def register() -> None:
    """Register configuration and task classes, now or as soon as there is something to register with."""
    if not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())
    for theirs, ours in _FOLLOWS.items():  # ours may bring more of theirs along
        if theirs in sys.modules:
            importlib.import_module(ours)
