"""Names of the tasks and the one place where a task is made known."""

from typing import TypeVar

from hf_ptune.registry import Registry
from hf_ptune.tasks.base import Task

_TASKS = Registry[type[Task]]("task")
AnyTask = TypeVar("AnyTask", bound=type[Task])


def register_task(task: AnyTask) -> AnyTask:
    """Make a task known under its name; a decorator of its class.

    Raises:
        ConfigError: the name is taken by another task.
    """
    _TASKS.add(task.name, task)
    return task


def get_task(name: str) -> type[Task]:
    """Look a task up by name.

    Raises:
        ConfigError: no such task.
    """
    return _TASKS.get(name)


def task_names() -> list[str]:
    """Names of all registered tasks, in order of registration."""
    return list(_TASKS.things)
