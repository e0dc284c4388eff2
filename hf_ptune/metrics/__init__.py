"""Metrics that ship with the package: they are modules of `evaluate` and need no download."""

from hf_ptune.metrics.classes import Accuracy, MacroF1, Seqeval

__all__ = ["Accuracy", "MacroF1", "Seqeval"]
