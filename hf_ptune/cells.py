"""Cells that hold more than text: lists and objects, written as JSON or as Python prints them."""

import ast
import contextlib
import json
import re
from typing import Any

from hf_ptune.errors import RecipeError

_LIST = re.compile(r"""\[\s*(['"\d-]|None|null|\[)[^\0]*\]|\{\s*['"][^\0]*\}""")
_OBJECTS = re.compile(rf"{_LIST.pattern}|\[\s*\{{[^\0]*\}}\s*\]")
_ARRAY = re.compile(r"""['"]\s+['"]""")  # printed by numpy, without commas


def read_cell(value: Any, objects: bool, where: str) -> Any:
    """Read the list that a text holds as JSON, or as Python prints it.

    Args:
        value: what a cell holds.
        objects: whether objects are read too.
        where: its place and role, for messages.

    Returns:
        The list or object; what looks like none as it is.

    Raises:
        RecipeError: it looks like a list and cannot be read.
    """
    pattern = _OBJECTS if objects else _LIST
    if not isinstance(value, str) or not pattern.fullmatch(value.strip()):
        return value
    kinds = (list, dict) if objects else (list,)
    with contextlib.suppress(ValueError):
        return found if isinstance(found := json.loads(value), kinds) else value
    if not _ARRAY.search(value):
        with contextlib.suppress(ValueError, SyntaxError):
            return found if isinstance(found := ast.literal_eval(value), kinds) else value
    if value.strip()[1:].lstrip()[:1] not in "'\"":
        return value  # a text that begins with a number in brackets
    raise RecipeError(f"{where} holds {value[:60]!r}, which is no list in JSON; write it with json.dumps.")
