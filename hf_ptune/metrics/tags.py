"""Tags of words, spelled alike whatever the scheme of their rows."""

import re
from collections.abc import Iterable

_OUTSIDE = "O"
_LETTERS = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S", "W": "S"}  # seqeval knows B, I, E, S
_BEFORE = re.compile(rf"([{''.join(_LETTERS)}])[-_](.+)")
_SMALL = re.compile(rf"{_OUTSIDE.lower()}|[{''.join(_LETTERS).lower()}][-_].+")
_BEHIND = re.compile(rf"(.+)[-_]([{''.join(_LETTERS)}])")


def spell_tags(labels: Iterable[str]) -> dict[str, str]:
    """Spell tags as B-, I-, E- or S- and the kind of their entity.

    Tags are told by all of them: as IOB, IOBES, BILOU, BMES or BMEWO, with the letter before or behind the kind; where
    some have no such letter, tags other than B- and I- are kinds themselves, and equal ones in a row are one entity.
    Small letters before the kind (o, b-, i-) are read as capitals where all tags have letters.

    Args:
        labels: all tags that there are.

    Returns:
        Each tag's spelling; O is O.
    """
    tags = set(labels) - {_OUTSIDE}
    large = {tag: tag[0].upper() + tag[1:] if _SMALL.fullmatch(tag) else tag for tag in tags}
    entities = set(large.values()) - {_OUTSIDE}
    if tags - entities and all(map(_BEFORE.fullmatch, entities)) and any(tag[0] in "BI" for tag in entities):
        spelled = spell_tags(entities)
        return {_OUTSIDE: _OUTSIDE} | {tag: spelled[large[tag]] for tag in tags}
    before = {tag: (found[1], found[2]) for tag in tags if (found := _BEFORE.fullmatch(tag))}
    behind = {tag: (found[2], found[1]) for tag in tags if (found := _BEHIND.fullmatch(tag))}
    if tags <= set(_LETTERS) and tags & {"B", "I"}:
        read = {tag: (tag, "_") for tag in tags}
    elif len(before) == len(tags):
        read = before
    elif len(behind) == len(tags) and _begins_kinds(list(behind.values())):
        read = behind
    else:
        read = {tag: ("I", tag) for tag in tags} | {tag: pair for tag, pair in before.items() if pair[0] in "BI"}
    return {_OUTSIDE: _OUTSIDE} | {tag: f"{_LETTERS[letter]}-{kind}" for tag, (letter, kind) in read.items()}


def _begins_kinds(pairs: list[tuple[str, str]]) -> bool:
    """Whether letters behind are a scheme's: entities begin, and a kind has several; names may end in a letter too."""
    return any(letter == "B" for letter, _ in pairs) and len({kind for _, kind in pairs}) < len(pairs)
