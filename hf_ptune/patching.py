"""Functions of ours in place of others' methods, each installed once however often its module is executed."""

import functools
from collections.abc import Callable
from typing import Any

_MARKS = "_ptune_patches"  # on a method: names of the functions that stand before it


def replaces(where: Any, name: str, when: Callable[[Any], bool] = lambda first: True) -> Callable[[Any], Any]:
    """Let callers of a method come to a function here; functions that replace the same one stack, the last outermost.

    Args:
        where: class or module.
        name: of its method or function. The function here takes the same first argument, then the original without
            it, then the other arguments.
        when: whether a call with this first argument comes here; the original is called where not.
    """

    def install(function: Any) -> Any:
        original = getattr(where, name)
        marks: tuple[str, ...] = getattr(original, _MARKS, ())
        mark = f"{function.__module__}.{function.__qualname__}"
        if mark in marks:
            return function

        @functools.wraps(original)
        def method(first: Any, *args: Any, **kwargs: Any) -> Any:
            if not when(first):
                return original(first, *args, **kwargs)
            return function(first, functools.partial(original, first), *args, **kwargs)

        setattr(method, _MARKS, (*marks, mark))
        setattr(where, name, method)
        return function

    return install
