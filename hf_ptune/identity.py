"""Whose a backbone is, and of which class its wrapper is: both survive copying and pickling."""

import functools
import inspect
import weakref
from typing import Any


class Owner:
    """Which wrapper a backbone belongs to, without keeping it alive; a copied backbone belongs to the copied one."""

    def __init__(self, wrapper: Any) -> None:
        self.reference = None if wrapper is None else weakref.ref(wrapper)

    def __call__(self) -> Any:
        return None if self.reference is None else self.reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        return Owner(memo.get(id(self())))

    def __reduce__(self) -> Any:
        return Owner, (None,)


_SPECIALISED: dict[tuple[type, type], type] = {}


def specialised(cls: Any, backbone_class: Any) -> type:
    """A class whose forward takes what the backbone's takes: the Trainer reads columns and labels off it."""
    if (cls, backbone_class) not in _SPECIALISED:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        functools.update_wrapper(forward, backbone_class.forward)
        vars(forward)["__signature__"] = inspect.signature(backbone_class.forward)
        del vars(forward)["__wrapped__"]  # accelerate would follow it to the backbone's, which has another self
        names = {"forward": forward, "__module__": cls.__module__, "backbone_class": backbone_class}
        _SPECIALISED[cls, backbone_class] = type(cls.__name__, (cls,), names)
    return _SPECIALISED[cls, backbone_class]


def blank(cls: Any, backbone_class: Any) -> Any:
    """A wrapper that copying or unpickling has still to fill."""
    made: Any = specialised(cls, backbone_class)
    return made.__new__(made)
