"""Axis letters used across the package, and one shape check.

B batch rows; S own (user's) tokens; T keys an own query sees; P virtual tokens; H embedding width, or, of a
query `[B, H, S, D]`, its heads; L attention sites; K key/value heads of a site; D width of a head; W width of all
keys and values of a virtual token, the sum over sites of K * (key D + value D); V vocabulary; C classes, which in
multiple choice are a row's choices; M and N what else the place at hand counts.
"""

from collections.abc import Sequence

import torch

from hf_ptune.errors import PTuneError


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None], letters: str, cure: str) -> None:
    """Refuse a tensor whose shape differs from the expected one.

    Args:
        name: what the tensor is called in the message.
        tensor: the tensor to check.
        expected: a size per axis; `None` admits any.
        letters: the axis letters of `expected`, e.g. "P H".
        cure: what the user can do about it.

    Raises:
        PTuneError: a different number of axes or another size.
    """
    found = tuple(tensor.shape)
    same = len(found) == len(expected) and all(e is None or e == f for e, f in zip(expected, found, strict=True))
    if not same:
        wanted = tuple("any" if e is None else e for e in expected)
        raise PTuneError(f"{name} has shape {found}, expected [{letters}] = {wanted}. {cure}")
