"""Functions in transformers' registries: one that is wrapped there is told from one that has taken its place."""

from collections.abc import Callable
from typing import Any

from transformers.utils.generic import GeneralInterface

_WRAPPED = "_ptune_wrapped"


def seal(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as one of ours."""
    # functools.wraps copies the mark to functions around it, but not what they are
    setattr(function, _WRAPPED, function)
    return function


def is_sealed(function: Callable[..., Any]) -> bool:
    return getattr(function, _WRAPPED, None) is function


def replace(registry: GeneralInterface, name: str, function: Callable[..., Any]) -> None:
    """Put a function where the registry looks `name` up: in its own mapping before that of all."""
    if name in registry._local_mapping:
        registry[name] = function
    else:
        registry.register(name, function)
