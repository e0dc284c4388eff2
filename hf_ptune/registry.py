"""Things by name: the one way in which methods and tasks are made known and looked up."""

from typing import Generic, TypeVar

from hf_ptune.errors import ConfigError

Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """Hold things by name, in order of registration.

    Args:
        kind: what they are, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.things: dict[str, Thing] = {}

    def add(self, name: str, thing: Thing) -> None:
        """Make a thing known.

        Raises:
            ConfigError: the name is taken by another one.
        """
        if self.things.setdefault(name, thing) is not thing:
            raise ConfigError(f"a {self.kind} named {name!r} is registered already; choose another name.")

    def get(self, name: str) -> Thing:
        """Look a thing up.

        Raises:
            ConfigError: no such thing.
        """
        if name not in self.things:
            raise ConfigError(f"{self.kind}={name!r} is not known; choose one of {', '.join(self.things)}.")
        return self.things[name]
