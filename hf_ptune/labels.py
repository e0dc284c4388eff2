"""Labels of rows brought under their names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging

from hf_ptune.errors import RecipeError
from hf_ptune.tasks.base import Row, missing

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """Rows of one file or split, the names of their labels where data, file or dataset tells them, and their places.

    Args:
        rows: by role.
        names: of labels, in order of their numbers.
        places: of the rows, for messages.
        classes: whether the dataset itself says that labels are numbers of classes.
        place: of all of them.
    """

    rows: list[Row]
    names: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    classes: bool = False
    place: str = ""


def name_labels(parts: Sequence[Part], role: str, known: Sequence[str]) -> list[Part]:
    """Give labels their names; whether numbers are names is decided for all parts, since some lack classes.

    They are where each of them is one. Numbers that a dataset says are classes always count the names, and so do those
    of a file beside it that tells no names, where they can.

    Args:
        parts: whose rows are changed.
        role: that holds labels, one or a list.
        known: names that the task tells, where a part has none.

    Returns:
        The parts, with the names that their labels have been given.

    Raises:
        RecipeError: a label is empty, no class, or of no name.
    """
    for part in parts:
        for row, where in zip(part.rows, part.places, strict=True):
            row[role] = _plain(row[role], part.names or known, where)
    lender = next((part for part in parts if part.names), None)
    parts = [part if lender is None or part.names else _lent(part, lender, role) for part in parts]
    numbers = {
        (number, tuple(part.names))
        for part in parts
        if part.names and not part.classes
        for number in _numbers(part, role)
        if number is not None
    }
    are_names = all(str(number) in names for number, names in numbers)
    if are_names and all(0 <= number < len(names) for number, names in numbers):
        _tell_names({(str(number), names[number]) for number, names in numbers})
    for part in parts:
        if part.names:
            for row, where in zip(part.rows, part.places, strict=True):
                row[role] = _name(row[role], part.names, part.classes or not are_names, where)
    return list(parts)


def _numbers(part: Part, role: str) -> set[int | None]:
    """The numbers among a part's labels; `None` stands for all that are none."""
    return {_number(value) for value in _flat([row[role] for row in part.rows])}


def _lent(part: Part, lender: Part, role: str) -> Part:
    """A part that tells no names of its numbers, with those of another one that fit them."""
    numbers, names = _numbers(part, role), lender.names
    found = sorted(n for n in numbers if n is not None)
    count = all(0 <= n < len(names) for n in found)
    are_names = all(str(n) in names for n in found)
    if not found or None in numbers or not (count or are_names):
        return part
    if lender.classes and count and are_names and (other := [n for n in found if names[n] != str(n)]):
        logger.warning_once(
            f"{part.place}: the labels {', '.join(map(str, found[:5]))} count the classes of {lender.place} from 0, as "
            f"its own numbers do: {other[0]} is the class {names[other[0]]!r}. If they are names, name all labels "
            "under data.labels."
        )
    return replace(part, names=names, classes=lender.classes and count)


def _tell_names(pairs: set[tuple[str, str]]) -> None:
    """Say that numbers are read as names where they could count other ones."""
    if other := sorted(pair for pair in pairs if pair[0] != pair[1]):
        name, counted = other[0]
        logger.warning_once(
            f"The labels {', '.join(sorted({n for n, _ in pairs})[:5])} are read as the names of classes, as each is "
            f"one; counted from 0, {name} would be the class {counted!r}. If they are such numbers, write names in "
            "their place."
        )


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else [value]


def _number(value: Any) -> int | None:
    """The whole number that a label is or is written as; truths are none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if value.removeprefix("-").isdecimal() and str(int(value)) == value else None
    return value if isinstance(value, int) else None


def _plain(value: Any, names: Sequence[str], where: str) -> Any:
    """A label as it is told: a name as it is, and a whole number that was read as 1.0 as 1.

    Raises:
        RecipeError: it is empty, or a number between the classes.
    """
    if isinstance(value, (list, tuple)):
        return [_plain(v, names, where) for v in value]
    if missing(value) or value == "":
        raise RecipeError(f"{where}: a label is empty; fill it, or take the row out.")
    if isinstance(value, float):
        if str(value) in names:
            return str(value)
        if not value.is_integer():
            raise RecipeError(
                f"{where}: has the label {value!r}; expected the name or number of a class. Where such numbers are "
                "classes, name them under data.labels; numbers to be predicted (regression) are none of the tasks."
            )
        return int(value)
    return value


def _name(value: Any, names: Sequence[str], count: bool, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_name(v, names, count, where) for v in value]
    text, number = str(value), _number(value)
    if text in names and not (count and number is not None):
        return text
    if number is None:
        number = int(value) if isinstance(value, int) else int(text) if text.isdecimal() else -1
    if 0 <= number < len(names):
        return names[number]
    raise RecipeError(
        f"{where}: has the label {value!r}; expected a number below {len(names)} or one of {', '.join(names[:10])}."
    )
