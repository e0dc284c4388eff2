"""One room per task; importing the package registers them all."""

from hf_ptune.cross_entropy import IGNORED

# the order of registration is the order in messages
from hf_ptune.tasks import sequence_classification, token_classification, multiple_choice  # isort: skip
from hf_ptune.tasks import question_answering, causal_lm, seq2seq_lm, masked_lm, cloze  # isort: skip
from hf_ptune.tasks.base import Answer, Collator, Feature, Row, Task
from hf_ptune.tasks.registry import get_task, register_task, task_names
from hf_ptune.tasks.trainer import TaskTrainer

__all__ = [
    "IGNORED",
    "Answer",
    "Collator",
    "Feature",
    "Row",
    "Task",
    "TaskTrainer",
    "causal_lm",
    "cloze",
    "get_task",
    "masked_lm",
    "multiple_choice",
    "question_answering",
    "register_task",
    "seq2seq_lm",
    "sequence_classification",
    "task_names",
    "token_classification",
]
