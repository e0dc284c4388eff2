"""Prompt learning as a part of transformers: importing registers the classes with the Auto classes."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_ptune.auto import register

if TYPE_CHECKING:
    from hf_ptune.callbacks import (
        DecayCallback,
        FreezeBackboneCallback,
        GuardCallback,
        LearningCallback,
        MemoryCallback,
        ModelCardCallback,
    )
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
    )
    from hf_ptune.multitask import MultiTaskPrompt, get_multitask_model
    from hf_ptune.wrapping import get_ptune_model

__version__ = "0.1.0"
__all__ = [
    "DecayCallback",
    "FreezeBackboneCallback",
    "GuardCallback",
    "LearningCallback",
    "MemoryCallback",
    "ModelCardCallback",
    "MultiTaskPrompt",
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
    "get_multitask_model",
    "get_ptune_model",
]

# of names that are not in modeling_ptune
_ROOMS = {
    "MultiTaskPrompt": "multitask",
    "PTuneConfig": "configuration_ptune",
    "PTuneError": "errors",
    "get_multitask_model": "multitask",
    "get_ptune_model": "wrapping",
}

register()


def __getattr__(name: str) -> Any:
    # torch and the Trainer are slow to import, and not every program that imports this package needs them
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "callbacks" if name.endswith("Callback") else _ROOMS.get(name, "modeling_ptune")
    value = getattr(importlib.import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
