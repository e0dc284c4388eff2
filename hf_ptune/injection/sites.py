"""An attention site: the place in one layer where a prefix meets the tokens, and what it holds right now."""

import threading
from typing import Any

import torch
from torch import nn

from hf_ptune.errors import InjectionError
from hf_ptune.methods.base import SiteShape

_ATTRIBUTE = "_ptune_site"
_UNSET = object()
_Pair = tuple[torch.Tensor, torch.Tensor]


class _Now:
    """What a site holds while a pass runs.

    `met` says that the prefix is among the keys of the attention call that runs. `compiled` tells what compiled code
    has written last: eager code in its midst knows nothing else.
    """

    pair: _Pair | None = None
    recording = False
    recorded: _Pair | None = None
    met = False

    def __init__(self) -> None:
        self.compiled = {"pair": False, "recording": False, "recorded": False, "met": False}


class Site:
    """State of one attention module of a wrapped backbone.

    Args:
        name: path of the attention module in the backbone.
        where: "encoder", "decoder" or "cross".
        layer: number of the layer, counted per `where`.
        shape: heads and widths of its keys and values.
        product: which of the products in an attention of its own is that of queries and keys.
        config: the backbone's configuration.
        causal: whether the tokens of a prompt that runs by itself see only those before them.
    """

    def __init__(
        self,
        name: str,
        where: str,
        layer: int,
        shape: SiteShape,
        product: int = 0,
        config: Any = None,
        causal: bool = False,
    ) -> None:
        self.name = name
        self.where = where
        self.layer = layer
        self.shape = shape
        self.product = product
        self.config = config
        self.causal = causal
        self.probing = False  # a candidate may turn out not to attend
        # `pair`, `recording`, `recorded` of each thread's pass, and of the latest one: compiled code runs in one thread
        self._here: Any = threading.local()
        self._latest = _Now()

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no part in the pass that is going on, nor in its graph
        return {k: v for k, v in vars(self).items() if k not in ("_here", "_latest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._here, self._latest = threading.local(), _Now()

    @property
    def pair(self) -> _Pair | None:
        """Keys and values `[K, P, D]` that meet the tokens of this thread's pass."""
        # threads of a backward have filled in nothing by themselves
        found: _Pair | None = self._read("pair", self._latest.pair)
        return found

    def _read(self, name: str, unset: Any) -> Any:
        latest = torch.compiler.is_compiling() or self._latest.compiled[name]
        return getattr(self._latest, name) if latest else getattr(self._here, name, unset)

    def _write(self, name: str, value: Any) -> None:
        compiled = torch.compiler.is_compiling()
        setattr(self._latest, name, value)
        self._latest.compiled[name] = compiled
        if not compiled:
            setattr(self._here, name, value)

    @property
    def key(self) -> torch.Tensor | None:
        pair = self.pair
        return None if pair is None else pair[0]

    @property
    def recording(self) -> bool:
        """Whether this thread's pass is that of the prompt itself."""
        found: bool = self._read("recording", False)
        return found

    @recording.setter
    def recording(self, on: bool) -> None:
        self._write("recording", on)

    @property
    def met(self) -> bool:
        """Whether the prefix is among the keys of this thread's attention call already."""
        found: bool = self._read("met", False)
        return found

    @met.setter
    def met(self, on: bool) -> None:
        self._write("met", on)

    @property
    def recorded(self) -> _Pair | None:
        found: _Pair | None = self._read("recorded", None)
        return found

    @recorded.setter
    def recorded(self, pair: _Pair | None) -> None:
        self._write("recorded", pair)

    def fill(self, pair: _Pair | None) -> None:
        """Let a pair meet the tokens of the pass that begins."""
        self._write("pair", pair)

    def swap(self, pair: _Pair | None) -> tuple[Any, bool]:
        """Fill this thread's pass alone; gives what `restore` takes."""
        before = getattr(self._here, "pair", _UNSET), self._latest.compiled["pair"]
        self._here.pair, self._latest.compiled["pair"] = pair, False
        return before

    def restore(self, before: tuple[Any, bool]) -> None:
        """Let this thread's pass have what it had, or nothing of its own again."""
        pair, self._latest.compiled["pair"] = before
        if pair is _UNSET:
            del self._here.pair
        else:
            self._here.pair = pair

    def record(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what the backbone computed for a prompt of batch 1: keys and values `[K, P, D]`."""
        self.recorded = (key, value)

    def check_recorded(self) -> None:
        """Refuse keys that are not those of the geometry."""
        if self.recorded is None:
            raise InjectionError(f"no keys were seen at {self.name} while the prompt ran through the backbone.")
        key, value = self.recorded
        found = SiteShape(key.shape[0], key.shape[2], value.shape[2])
        if found != self.shape:
            raise InjectionError(f"{self.name} computed keys of {found} for the prompt, expected {self.shape}.")

    def prefix(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[K, P, D]` on the device and in the type of the attention's own tensors."""
        pair = self.pair
        assert pair is not None
        return pair[0].to(like.device, like.dtype), pair[1].to(like.device, like.dtype)

    @property
    def num_virtual_tokens(self) -> int:
        key = self.key
        return 0 if key is None else key.shape[1]


def site_of(module: nn.Module) -> Site | None:
    """The site of an attention module, or `None` where there is none."""
    site: Site | None = module.__dict__.get(_ATTRIBUTE)
    return site


def place(module: nn.Module, site: Site) -> None:
    module.__dict__[_ATTRIBUTE] = site


def remove(module: nn.Module) -> None:
    module.__dict__.pop(_ATTRIBUTE, None)


def key_groups(module: nn.Module) -> int:
    """How many query heads share a key head, as the attention module says."""
    groups: Any = getattr(module, "num_key_value_groups", 1)
    return int(groups) if isinstance(groups, int) else 1
