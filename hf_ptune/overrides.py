"""Changes of a recipe on the command line, apart from the command's own arguments."""

import re
from collections.abc import Sequence

_OVERRIDE = re.compile(r"--\w[\w-]*(\.[\w-]+)*=")


def split_overrides(arguments: Sequence[str], own: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Take what changes a recipe out of a command line: a parser takes an unknown option with a space for no option.

    Args:
        arguments: of the command line.
        own: options that take a value and are the command's own.

    Returns:
        The other arguments, and the overrides.
    """
    overrides = [a for a in arguments if _OVERRIDE.match(a) and a.partition("=")[0] not in own]
    return [a for a in arguments if a not in overrides], overrides
