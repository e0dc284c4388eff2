"""Callbacks of the Trainer: freeze the backbone, guard the first batch, report memory and speed."""

from hf_ptune.callbacks.freeze import FreezeBackboneCallback
from hf_ptune.callbacks.guard import GuardCallback, check_batch
from hf_ptune.callbacks.memory import MemoryCallback

__all__ = ["FreezeBackboneCallback", "GuardCallback", "MemoryCallback", "check_batch"]
