"""What all callbacks have in common: how they may be passed, runs without training, and models of others."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from setup_runs import Rows, bert, tensors, trainer, wrap

from hf_ptune import (
    DecayCallback,
    FreezeBackboneCallback,
    GuardCallback,
    LearningCallback,
    MemoryCallback,
    ModelCardCallback,
    PTuneError,
)
from hf_ptune.callbacks import BestMetricCallback

CLASSES: list[Any] = [
    FreezeBackboneCallback,
    GuardCallback,
    LearningCallback,
    MemoryCallback,
    ModelCardCallback,
    BestMetricCallback,
]


def test_classes_are_as_good_as_instances(tmp_path: Path) -> None:
    ends = []
    for callbacks in (CLASSES, [made() for made in CLASSES]):
        model = wrap(bert())
        trainer(model, tmp_path, callbacks, Rows(classes=3)).train()
        ends.append(tensors(model))
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_runs_that_only_evaluate_are_left_alone(tmp_path: Path) -> None:
    rows = Rows(4, classes=3)
    model = wrap(bert())
    run = trainer(model, tmp_path, [*CLASSES, DecayCallback(0.9)])
    run.train_dataset, run.eval_dataset = None, rows
    assert set(run.evaluate()) == set(trainer(model, tmp_path).evaluate(rows))
    assert run.predict(rows).predictions.shape == (4, 3)


@pytest.mark.parametrize("made", [*CLASSES, lambda: DecayCallback(0.9)])
def test_models_of_others_train_or_are_refused_with_the_cure(tmp_path: Path, made: Any) -> None:
    refuses = made in (FreezeBackboneCallback, GuardCallback, LearningCallback)
    with (
        pytest.raises(PTuneError, match="found BertForSequenceClassification.*get_ptune_model")
        if refuses
        else nullcontext()
    ):
        trainer(bert(), tmp_path, [made()], Rows(classes=3)).train()
