"""Metrics that need no download: accuracy, macro F1, and the F1 of entities."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from torch import Tensor
from transformers import EvalPrediction

from hf_ptune.data import IGNORED
from hf_ptune.errors import PTuneError

# task -> the number to show before and after training
MAIN_METRIC = {"SEQ_CLS": "accuracy", "TOKEN_CLS": "f1", "CAUSAL_LM": "accuracy"}


def _describe(description: str, citation: str, feature: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions and references, as many of each",
        features=datasets.Features({"predictions": feature, "references": feature}),
    )


class Accuracy(evaluate.Metric):
    """Count the part of predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Part of predictions that are right.", "", datasets.Value("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(evaluate.Metric):
    """Average the F1 of every class, each class alike."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Mean over classes of F1.", "", datasets.Value("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        try:
            from sklearn.metrics import f1_score
        except ImportError as error:
            raise PTuneError('macro F1 needs scikit-learn: pip install "hf_ptune[metrics]".') from error
        return {"f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0))}


class Seqeval(evaluate.Metric):
    """Score entities of IOB-tagged sequences: precision, recall, F1, and the accuracy of tags."""

    def _info(self) -> evaluate.MetricInfo:
        citation = "Nakayama 2018, seqeval: a Python framework for sequence labeling evaluation"
        return _describe("F1 of whole entities.", citation, datasets.Sequence(datasets.Value("string")))

    def _compute(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        try:
            from seqeval import metrics
        except ImportError as error:
            raise PTuneError('the F1 of entities needs seqeval: pip install "hf_ptune[metrics]".') from error
        return {
            "precision": float(metrics.precision_score(references, predictions, zero_division=0)),
            "recall": float(metrics.recall_score(references, predictions, zero_division=0)),
            "f1": float(metrics.f1_score(references, predictions, zero_division=0)),
            "accuracy": float(metrics.accuracy_score(references, predictions)),
        }


def make_compute_metrics(task: str, labels: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The Trainer's `compute_metrics` for a task.

    Args:
        task: "SEQ_CLS" (accuracy, f1_macro), "TOKEN_CLS" (entities) or "CAUSAL_LM" (accuracy of the answer's
            tokens, and exact_match: the part of answers of which every token is right, that is, which greedy
            decoding would give).
        labels: their names, for TOKEN_CLS.
    """

    def classes(prediction: EvalPrediction) -> dict[str, float]:
        pairs = {"predictions": prediction.predictions, "references": prediction.label_ids}
        results: dict[str, float] = {}
        for metric in (Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)):
            results |= metric.compute(**pairs)
        return results

    def tags(prediction: EvalPrediction) -> dict[str, float]:
        kept = np.asarray(prediction.label_ids) != IGNORED  # [N, T]
        named = [
            [[labels[n] for n in row[keep]] for row, keep in zip(np.asarray(ids), kept, strict=True)]
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        result: dict[str, float] = Seqeval(keep_in_memory=True).compute(predictions=named[0], references=named[1])
        return result

    def answers(prediction: EvalPrediction) -> dict[str, float]:
        # the logits at a position are of the next token
        found, wanted = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
        kept = wanted != IGNORED  # [N, T - 1]
        result: dict[str, float] = Accuracy(keep_in_memory=True).compute(
            predictions=found[kept], references=wanted[kept]
        )
        return result | {"exact_match": float(np.mean(((found == wanted) | ~kept).all(axis=1)))}

    return {"SEQ_CLS": classes, "TOKEN_CLS": tags, "CAUSAL_LM": answers}[task]


def choose_best(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The Trainer's `preprocess_logits_for_metrics`: class numbers `[B]` or `[B, T]`, to keep no logits."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(dim=-1)
