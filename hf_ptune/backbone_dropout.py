"""The dropout of a frozen backbone, taken out while a prompt trains in front of it, and put back."""

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
        self.taken: list[tuple[nn.Module, str, float]] = []

    def follow(self, training: bool) -> None:
        """Set every probability to zero for training, else to what it was."""
        if self.kept or (training and self.taken):
            return
        if training:
            self.taken = [(m, name, value) for m in self.body.modules() for name, value in _probabilities(m)]
            for module, name, _ in self.taken:
                setattr(module, name, 0.0)
            return
        taken, self.taken = self.taken, []
        for module, name, value in taken:
            setattr(module, name, value)


def _probabilities(module: nn.Module) -> list[tuple[str, float]]:
    """Names and values of what a module drops by, where that is more than zero (layers dropped whole included)."""
    held: dict[str, Any] = vars(module)
    dropout = isinstance(module, _DropoutNd)
    names = [n for n in held if _NAMED in n or (dropout and n == "p")]
    return [(n, held[n]) for n in names if isinstance(held[n], float) and held[n] > 0]
