"""Callbacks of the Trainer: freeze the backbone, guard the first batch, watch learning, report memory and speed."""

import hf_ptune.engines  # the Trainer comes there
import hf_ptune.multitask_saving  # noqa: F401  # and there
from hf_ptune.callbacks.best import BestMetricCallback
from hf_ptune.callbacks.decay import DecayCallback
from hf_ptune.callbacks.early_stopping import EarlyStoppingCallback
from hf_ptune.callbacks.freeze import FreezeBackboneCallback
from hf_ptune.callbacks.guard import GuardCallback, check_batch
from hf_ptune.callbacks.learning import LearningCallback
from hf_ptune.callbacks.memory import MemoryCallback
from hf_ptune.callbacks.model_card import ModelCardCallback

__all__ = [
    "BestMetricCallback",
    "DecayCallback",
    "EarlyStoppingCallback",
    "FreezeBackboneCallback",
    "GuardCallback",
    "LearningCallback",
    "MemoryCallback",
    "ModelCardCallback",
    "check_batch",
]
