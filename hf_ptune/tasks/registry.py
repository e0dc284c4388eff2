"""Names of the tasks and the one place where a task is made known."""

from typing import TypeVar

from hf_ptune.errors import ConfigError
from hf_ptune.tasks.base import Task

_TASKS: dict[str, type[Task]] = {}
AnyTask = TypeVar("AnyTask", bound=type[Task])


def register_task(task: AnyTask) -> AnyTask:
    """Make a task known under its name; a decorator of its class.

    Raises:
        ConfigError: the name is taken by another task.
    """
    if _TASKS.setdefault(task.name, task) is not task:
        raise ConfigError(f"a task named {task.name!r} is registered already; choose another name.")
    return task


def get_task(name: str) -> type[Task]:
    """Look a task up by name.

    Raises:
        ConfigError: no such task.
    """
    if name not in _TASKS:
        raise ConfigError(f"task={name!r} is not known; choose one of {', '.join(task_names())}.")
    return _TASKS[name]


def task_names() -> list[str]:
    """Names of all registered tasks, in order of registration."""
    return list(_TASKS)
