"""One room per task; importing the package registers them all."""

from hf_ptune.tasks import sequence_classification, token_classification, causal_lm  # isort: skip
from hf_ptune.tasks.base import IGNORED, Answer, Feature, Row, Task
from hf_ptune.tasks.registry import get_task, register_task, task_names
from hf_ptune.tasks.trainer import TaskTrainer

__all__ = [
    "IGNORED",
    "Answer",
    "Feature",
    "Row",
    "Task",
    "TaskTrainer",
    "causal_lm",
    "get_task",
    "register_task",
    "sequence_classification",
    "task_names",
    "token_classification",
]
