"""What metrics are given: predictions and references, and which letters are words of their own."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_ptune.errors import PTuneError

EAST_ASIAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # of Chinese and Japanese, as a range of a pattern


class Metric(evaluate.Metric):
    """Refuse what cannot be scored before it is."""

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        if not predictions:
            raise PTuneError(f"{type(self).__name__} was given no predictions; expected one or more, and references.")
        return self._score(predictions, references)

    def _score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Score one prediction or more, each beside its reference."""
        raise NotImplementedError


class WrittenTextMetric(Metric):
    """Refuse texts that have no reference, too."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        if (bare := next((n for n, texts in enumerate(references) if not texts), None)) is not None:
            raise PTuneError(
                f"{type(self).__name__}: prediction {bare} has no reference; expected a list of one text or more."
            )
        return super()._compute(predictions, references)


def same_kind(description: str, citation: str, feature: Any) -> evaluate.MetricInfo:
    """Say that a metric compares things of one kind, one by one."""
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions and references, as many of each",
        features=datasets.Features({"predictions": feature, "references": feature}),
    )


def texts_with_references(description: str, citation: str) -> evaluate.MetricInfo:
    """Say that a metric compares each text with several."""
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: texts; references: a list of texts for each",
        features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
    )
