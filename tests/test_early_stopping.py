"""Runs that end when held-out rows get no better, and rates that fall by epochs."""

from pathlib import Path
from typing import Any

import pytest
from test_train import write_base, write_recipe

from hf_ptune.cards import RunFacts
from hf_ptune.errors import RecipeError
from hf_ptune.recipe import make_recipe
from hf_ptune.sweep import sweep
from hf_ptune.train import run
from hf_ptune.train_multitask import make_multitask_recipe
from hf_ptune.train_multitask import run as run_tasks


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe that learns nothing, so that the first evaluation stays the best."""
    found = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    found["training"] |= {"learning_rate": 1e-30, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 40}
    return found | {"early_stopping_patience": 2}


def test_training_ends_early(content: dict[str, Any], tmp_path: Path) -> None:
    content["data"] |= {"test_source": "rows.jsonl"}
    outcome = run(make_recipe(content, folder=tmp_path))
    assert (
        RunFacts.load(outcome.folder).history[-1]["step"] == 6 and "loss" in outcome.test
    )  # the best at 2, none at 4 and 6
    content["training"] |= {"metric_for_best_model": "acc"}
    with pytest.raises(RecipeError, match="'acc', which is not measured"):
        run(make_recipe(content, folder=tmp_path))


@pytest.mark.parametrize(("restored", "last"), [(False, 10), (True, 8)])
def test_a_run_that_goes_on_counts_its_own_evaluations(
    restored: bool, last: int, content: dict[str, Any], tmp_path: Path
) -> None:
    """And those of its checkpoint where it takes callbacks up again, but not what it measures before it goes on."""
    content["training"] |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    content["early_stopping_patience"] = 3
    run(make_recipe(content, folder=tmp_path))  # the best at 2, none at 4
    content["training"] |= {"max_steps": 40, "resume_from_checkpoint": "true"}
    content["training"] |= {"restore_callback_states_from_checkpoint": restored}
    history = RunFacts.load(run(make_recipe(content, folder=tmp_path)).folder).history
    assert history[-1]["step"] == last


def test_a_sweep_measures_what_its_run_would_keep(content: dict[str, Any], tmp_path: Path) -> None:
    """The best checkpoint of a rate that spoils what was learned before."""
    del content["early_stopping_patience"]
    content["data"] |= {"test_source": "rows.jsonl"}
    schedule = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 4, "save_steps": 2}
    content["training"] |= schedule | {"learning_rate": 1.0, "save_strategy": "steps", "load_best_model_at_end": True}
    recipe = make_recipe(content, folder=tmp_path)
    outcome = run(recipe)
    history = RunFacts.load(outcome.folder).history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"]][:2]
    found = sweep(recipe, tmp_path / "grid", [1.0])
    assert found.trials[0].error is None
    assert found.trials[0].metrics["loss"] == pytest.approx(min(losses)) and min(losses) < losses[-1]
    assert outcome.after["loss"] == pytest.approx(min(losses))


@pytest.mark.parametrize("named", [{}, {"metric_for_best_model": "mean"}])
def test_tasks_end_together(named: dict[str, Any], content: dict[str, Any], tmp_path: Path) -> None:
    content["tasks"] = [{"name": "one", "task": content.pop("task"), "data": content.pop("data")}]
    content["training"] |= named
    run_tasks(make_multitask_recipe(content, folder=tmp_path))
    assert RunFacts.load(tmp_path / "out" / "adapter" / "one").history[-1]["step"] == 6


def test_what_it_needs(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="early_stopping_patience is 0; expected 1 or more"):
        make_recipe(content | {"early_stopping_patience": 0})
    content["training"] |= {"eval_strategy": "no"}
    with pytest.raises(RecipeError, match="early_stopping_patience counts evaluations.*eval_strategy: epoch"):
        run(make_recipe(content, folder=tmp_path))


def test_rates_fall_by_epochs(content: dict[str, Any], tmp_path: Path) -> None:
    del content["early_stopping_patience"]
    changes = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": -1, "num_train_epochs": 2}
    content["training"] |= changes | {"learning_rate": 0.1, "eval_strategy": "no", "logging_strategy": "epoch"}
    content["learning_rate_decay"] = 0.5
    folder = run(make_recipe(content, folder=tmp_path)).folder
    assert "| `learning_rate_decay` | 0.5 |" in (folder / "README.md").read_text()
    history = RunFacts.load(folder).history
    rates = [(entry["learning_rate"], entry["epoch"]) for entry in history if "learning_rate" in entry]
    assert rates and all(rate == pytest.approx(0.1 if epoch <= 1 else 0.05) for rate, epoch in rates)
    content["training"] |= {"lr_scheduler_type": "reduce_lr_on_plateau"}
    with pytest.raises(RecipeError, match="reduce_lr_on_plateau, which follows measurements, beside"):
        run(make_recipe(content, folder=tmp_path))
    with pytest.raises(RecipeError, match="learning_rate_decay is 0.0; expected more than 0 and at most 1"):
        make_recipe(content | {"learning_rate_decay": 0.0})
