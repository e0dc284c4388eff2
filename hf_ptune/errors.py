"""The errors users meet; each message says what was found, what was expected and the cure."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# what is tried out on a base may end in one of these, which says nothing of its family
DEVICE_FAILURES: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)
DEVICE_FAILURES += (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
INTERRUPTED, TERMINATED = 130, 143  # exit codes, as shells have them
# how libraries of Rust end what the system told them: tokenizers raises an Exception, safetensors an error of its own
_SYSTEM = re.compile(r"(.*) \(os error ([0-9]+)\)", re.DOTALL)


class PTuneError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PTuneError, ValueError):
    """Raised when options cannot be what was set: out of range, at odds with each other, or not for this backbone."""


class TaskError(PTuneError):
    """Raised when an adapter is loaded for another task than its own.

    It is no ValueError: after one, pipelines go on to whatever class config.json names.
    """


class BackboneError(PTuneError):
    """Raised when a backbone cannot take a method, or is not the one an adapter was trained on."""


class AdapterFileError(PTuneError):
    """Raised when a folder or file does not hold the adapter that its configuration describes."""


class HubError(PTuneError):
    """Raised when the Hub refuses a push or cannot be reached."""


class GuardError(PTuneError):
    """Raised before training or measuring, when a batch or the rows show that it could not work."""


class RecipeError(PTuneError, ValueError):
    """Raised when a recipe cannot be run as it is written: its keys, the rows it names, or both together."""


class InjectionError(PTuneError):
    """Raised when a prompt cannot be put into the computation that was asked for."""


class TemplateError(PTuneError, ValueError):
    """Raised when a row and a template, or a word and a tokenizer, do not fit together."""


class Terminated(KeyboardInterrupt):
    """Raised where SIGTERM ends a run, as Ctrl-C would: a scheduler sends it before it takes the machine away."""


def shorten(said: object, most: int = 300) -> str:
    """What somebody else said, on one line of a message."""
    line = " ".join(str(said).split()) or type(said).__name__
    return line if len(line) <= most else line[:most] + "…"


def from_system(error: Exception, path: str | os.PathLike[str] | None = None) -> OSError | None:
    """What the operating system said of a file, such as that the disk is full, as Python says it.

    Args:
        error: Python's own, or that of another library.
        path: what was being written; told where the error names no file.

    Returns:
        The error; `None` where it is of another kind.
    """
    if isinstance(error, OSError):
        if error.errno is None or error.filename is not None or isinstance(error, ConnectionError):  # a broken pipe too
            return error
        said, number = error.strerror or str(error), error.errno
    elif isinstance(error, PTuneError) or (found := _SYSTEM.match(str(error))) is None:
        return None
    else:
        said, number = shorten(found[1]), int(found[2])
    return OSError(number, said, None if path is None else os.fspath(path))


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let what the operating system refuses say which file or folder was being written.

    Args:
        path: of it.

    Raises:
        OSError: in the place of one without a name, and of those of other libraries.
    """
    try:
        yield
    except Exception as error:  # libraries of Rust raise whatever they like
        told = from_system(error, path)
        if told is None or told is error:
            raise
        raise told from error
