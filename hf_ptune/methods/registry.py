"""Names of the methods and the one place where a method is made known."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_ptune.methods.base import EncoderSpec, PromptEncoder, PromptKind
from hf_ptune.registry import Registry


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: value of `PTuneConfig.method`.
        title: name in prose.
        paper: author, year, section.
        kind: what its encoder returns; `None` where no virtual token exists (BitFit).
        build: makes the encoder; `None` with `kind=None`.
        reparameterised: whether a network stands between the trained tensor and the prompt.
        of_base: names the base's own parameters that the method trains; `None` where it trains none.
    """

    name: str
    title: str
    paper: str
    kind: PromptKind | None
    build: Callable[[EncoderSpec], PromptEncoder] | None
    reparameterised: bool = False
    of_base: Callable[[nn.Module], set[str]] | None = None


_METHODS = Registry[Method]("method")


def register_method(method: Method) -> Method:
    """Make a method known under its name.

    Raises:
        ConfigError: the name is taken by another method.
    """
    _METHODS.add(method.name, method)
    return method


def get_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        ConfigError: no such method.
    """
    return _METHODS.get(name)


def method_names() -> list[str]:
    """Names of all registered methods, in order of registration."""
    return list(_METHODS.things)
