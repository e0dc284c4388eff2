"""Metrics: values by hand, without network."""

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_ptune.metrics import Accuracy, MacroF1, Seqeval
from hf_ptune.tasks import IGNORED
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.tasks.sequence_classification import SequenceClassification
from hf_ptune.tasks.token_classification import TokenClassification


def test_values_by_hand() -> None:
    pairs = {"predictions": [0, 0, 1, 2], "references": [0, 1, 1, 1]}
    assert Accuracy(keep_in_memory=True).compute(**pairs) == {"accuracy": 0.5}
    # F1: class 0 2/3, class 1 1/2, class 2 0
    assert MacroF1(keep_in_memory=True).compute(**pairs)["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    found = Seqeval(keep_in_memory=True).compute(
        predictions=[["B-X", "I-X", "O"], ["B-Y", "O"]], references=[["B-X", "I-X", "O"], ["B-X", "O"]]
    )
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": pytest.approx(4 / 5)}


def test_they_are_metrics_of_evaluate() -> None:
    both = evaluate.combine([Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    assert both.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0, "f1_macro": 1.0}


def test_tags_leave_ignored_positions_out() -> None:
    labels = np.array([[IGNORED, 0, 1, IGNORED], [IGNORED, 2, IGNORED, IGNORED]])
    chosen = np.array([[2, 0, 1, 0], [0, 2, 0, 0]])
    found = TokenClassification().compute_metrics(EvalPrediction(chosen, labels), [], ["B-X", "I-X", "O"])
    assert found["f1"] == 1.0


def test_answers_are_compared_with_the_token_before() -> None:
    labels = np.array([[IGNORED, IGNORED, 5, 6], [IGNORED, 7, 8, IGNORED]])
    chosen = np.array([[0, 5, 6, 0], [7, 0, 0, 0]])
    found = CausalLM().compute_metrics(EvalPrediction(chosen, labels), [], [])
    assert found == {"accuracy": 0.75, "exact_match": 0.5}


def test_logits_become_classes() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    task = SequenceClassification()
    assert task.preprocess_logits((logits, logits), logits).tolist() == [1, 0]
    prediction = EvalPrediction(np.array([1, 0]), np.array([1, 1]))
    assert task.compute_metrics(prediction, [], ["a", "b"])["accuracy"] == 0.5
