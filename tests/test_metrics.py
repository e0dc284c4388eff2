"""Metrics: values by hand, without network."""

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_ptune.data import IGNORED
from hf_ptune.metrics import Accuracy, MacroF1, Seqeval, choose_best, make_compute_metrics


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
    compute = make_compute_metrics("TOKEN_CLS", ["B-X", "I-X", "O"])
    assert compute(EvalPrediction(chosen, labels))["f1"] == 1.0


def test_answers_are_compared_with_the_token_before() -> None:
    labels = np.array([[IGNORED, IGNORED, 5, 6], [IGNORED, 7, 8, IGNORED]])
    chosen = np.array([[0, 5, 6, 0], [7, 0, 0, 0]])
    found = make_compute_metrics("CAUSAL_LM", [])(EvalPrediction(chosen, labels))
    assert found == {"accuracy": 0.75, "exact_match": 0.5}


def test_logits_become_classes() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert choose_best((logits, logits), logits).tolist() == [1, 0]
    assert make_compute_metrics("SEQ_CLS", [])(EvalPrediction(np.array([1, 0]), np.array([1, 1])))["accuracy"] == 0.5
