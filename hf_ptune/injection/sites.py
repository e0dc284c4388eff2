"""An attention site: the place in one layer where a prefix meets the tokens, and what it holds right now."""

from typing import Any

import torch
from torch import nn

from hf_ptune.errors import InjectionError
from hf_ptune.methods.base import SiteShape

_ATTRIBUTE = "_ptune_site"


class Site:
    """State of one attention module of a wrapped backbone.

    Args:
        name: path of the attention module in the backbone.
        where: "encoder", "decoder" or "cross".
        layer: number of the layer, counted per `where`.
        shape: heads and widths of its keys and values.
        product: which of the products in an attention of its own is that of queries and keys.
        config: the backbone's configuration.
    """

    def __init__(
        self, name: str, where: str, layer: int, shape: SiteShape, product: int = 0, config: Any = None
    ) -> None:
        self.name = name
        self.where = where
        self.layer = layer
        self.shape = shape
        self.product = product
        self.config = config
        self.key: torch.Tensor | None = None  # [K, P, D]
        self.value: torch.Tensor | None = None  # [K, P, D]
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None
        self.recording = False
        self.probing = False  # a candidate may turn out not to attend

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no part in the pass that is going on, nor in its graph
        return vars(self) | {"key": None, "value": None, "recorded": None}

    def fill(self, pair: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.key, self.value = pair if pair is not None else (None, None)

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
        assert self.key is not None and self.value is not None
        return self.key.to(like.device, like.dtype), self.value.to(like.device, like.dtype)

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.key is None else self.key.shape[1]


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
