"""Metrics of classes: accuracy, macro F1, and the F1 of entities."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_ptune.errors import PTuneError
from hf_ptune.metrics.inputs import Metric, same_kind
from hf_ptune.metrics.tags import spell_tags


class Accuracy(Metric):
    """Count the part of predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        return same_kind("Part of predictions that are right.", "", datasets.Value("int64"))

    def _score(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(Metric):
    """Average the F1 of every class, each class alike."""

    def _info(self) -> evaluate.MetricInfo:
        return same_kind("Mean over classes of F1.", "", datasets.Value("int64"))

    def _score(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        try:
            from sklearn.metrics import f1_score
        except ImportError as error:
            raise PTuneError('macro F1 needs scikit-learn: pip install "hf_ptune[metrics]".') from error
        return {"f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0))}


class Seqeval(Metric):
    """Score entities of tagged sequences: precision, recall, F1, and the accuracy of tags.

    Tags are of IOB, IOBES, BILOU, BMES or BMEWO, or plain classes, of which equal ones in a row are one entity.
    """

    def _info(self) -> evaluate.MetricInfo:
        citation = "Nakayama 2018, seqeval: a Python framework for sequence labeling evaluation"
        return same_kind("F1 of whole entities.", citation, datasets.Sequence(datasets.Value("string")))

    def _score(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        if not any(map(len, references)):
            raise PTuneError(f"Seqeval was given {len(references)} sentences without a tag; expected one tag or more.")
        try:
            from seqeval import metrics
        except ImportError as error:
            raise PTuneError('the F1 of entities needs seqeval: pip install "hf_ptune[metrics]".') from error
        spelling = spell_tags(tag for tags in (*predictions, *references) for tag in tags)
        found, wanted = ([[spelling[tag] for tag in tags] for tags in rows] for rows in (predictions, references))
        return {
            "precision": float(metrics.precision_score(wanted, found, zero_division=0)),
            "recall": float(metrics.recall_score(wanted, found, zero_division=0)),
            "f1": float(metrics.f1_score(wanted, found, zero_division=0)),
            "accuracy": float(metrics.accuracy_score(references, predictions)),
        }
