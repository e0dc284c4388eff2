"""Metrics that ship with the package: they are modules of `evaluate` and need no download."""

from hf_ptune.metrics.classes import Accuracy, MacroF1, Seqeval
from hf_ptune.metrics.spans import SpanMatch
from hf_ptune.metrics.texts import Bleu, RougeL

__all__ = ["Accuracy", "Bleu", "MacroF1", "RougeL", "Seqeval", "SpanMatch"]
