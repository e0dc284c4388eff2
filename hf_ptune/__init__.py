"""Prompt learning as a part of transformers: importing registers the classes with the Auto classes."""

from typing import TYPE_CHECKING, Any

from hf_ptune.auto import register
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import PTuneError
from hf_ptune.modeling_ptune import (
    PTuneForCausalLM,
    PTuneForMaskedLM,
    PTuneForMultipleChoice,
    PTuneForQuestionAnswering,
    PTuneForSeq2SeqLM,
    PTuneForSequenceClassification,
    PTuneForTokenClassification,
    PTuneModel,
    PTunePreTrainedModel,
    get_ptune_model,
)

if TYPE_CHECKING:
    from hf_ptune.callbacks import FreezeBackboneCallback, GuardCallback, MemoryCallback

__version__ = "0.1.0"
__all__ = [
    "FreezeBackboneCallback",
    "GuardCallback",
    "MemoryCallback",
    "PTuneConfig",
    "PTuneError",
    "PTuneForCausalLM",
    "PTuneForMaskedLM",
    "PTuneForMultipleChoice",
    "PTuneForQuestionAnswering",
    "PTuneForSeq2SeqLM",
    "PTuneForSequenceClassification",
    "PTuneForTokenClassification",
    "PTuneModel",
    "PTunePreTrainedModel",
    "get_ptune_model",
]
_CALLBACKS = ("FreezeBackboneCallback", "GuardCallback", "MemoryCallback")

register()


def __getattr__(name: str) -> Any:
    # the Trainer's modules are slow to import, and serving does not need them
    if name in _CALLBACKS:
        from hf_ptune import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
