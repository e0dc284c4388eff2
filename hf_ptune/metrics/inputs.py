"""What metrics are given: predictions and references, and which letters are words of their own."""

from typing import Any

import datasets
import evaluate

EAST_ASIAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # of Chinese and Japanese, as a range of a pattern


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
