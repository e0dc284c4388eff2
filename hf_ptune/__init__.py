"""Prompt learning as a part of transformers: importing registers the classes with the Auto classes."""

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

__version__ = "0.1.0"
__all__ = [
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

register()
