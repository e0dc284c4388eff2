"""Learning rates that fall by a factor with every epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from setup_runs import Rows, bert, trainer, wrap
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_ptune import DecayCallback
from hf_ptune.errors import ConfigError


def run(tmp_path: Path, factor: float = 0.5, rows: int = 16, **settings: Any) -> Trainer:
    """Three epochs, of four batches where nothing else is said, two of them a step."""
    options = {"lr_scheduler_type": "constant", "logging_steps": 1, "num_train_epochs": 3, "learning_rate": 0.08}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": -1} | settings
    return trainer(wrap(bert()), tmp_path, [DecayCallback(factor)], Rows(rows, classes=3), **options)


def rates(found: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in found.state.log_history if "learning_rate" in entry]


def test_rates_fall_with_every_epoch(tmp_path: Path) -> None:
    found = run(tmp_path)
    found.train()
    assert rates(found) == pytest.approx([0.08, 0.08, 0.04, 0.04, 0.02, 0.02])


def test_an_epoch_s_last_step_may_have_fewer_batches(tmp_path: Path) -> None:
    found = run(tmp_path, rows=20)
    found.train()
    assert found.state.max_steps == 9
    assert rates(found) == pytest.approx([0.08] * 3 + [0.04] * 3 + [0.02] * 3)


def test_it_stands_on_the_trainer_s_own_schedule(tmp_path: Path) -> None:
    plain = run(tmp_path, factor=1.0, lr_scheduler_type="linear", warmup_steps=2)
    plain.train()
    found = run(tmp_path, lr_scheduler_type="linear", warmup_steps=2)
    found.train()
    own = [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates(found) == pytest.approx([r * f for r, f in zip(rates(plain), own, strict=True)])
    assert max(rates(plain)) == 0.08


def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    whole.train()
    half = run(tmp_path / "half", save_strategy="steps", save_steps=3)
    half.train()
    again = run(tmp_path / "half", save_strategy="no")
    again.train(str(tmp_path / "half" / "checkpoint-3"))
    assert rates(again)[-3:] == pytest.approx([0.04, 0.02, 0.02])
    assert torch.equal(again.model.prompt.weight, whole.model.prompt.weight)


def test_a_schedule_of_one_s_own_falls_once(tmp_path: Path) -> None:
    first = run(tmp_path)
    optimizer = torch.optim.SGD(first.model.prompt.parameters(), lr=0.08)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callback = DecayCallback(0.5)
    for _ in range(2):
        loader = first.get_train_dataloader()
        callback.on_train_begin(first.args, first.state, first.control, lr_scheduler=schedule, train_dataloader=loader)
    assert schedule.lr_lambdas[0](2) == 0.5


class Endless(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        rows = Rows(16, classes=3)
        while True:
            yield from (rows[n] for n in range(16))


def test_what_it_refuses(tmp_path: Path) -> None:
    for factor in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="DecayCallback: factor=.*; expected more than 0 and at most 1"):
            DecayCallback(factor)
    measured = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    with pytest.raises(ConfigError, match="DecayCallback cannot be joined with ReduceLROnPlateau"):
        run(tmp_path, **measured).train()
    endless = run(tmp_path, max_steps=2)
    endless.train_dataset = Endless()
    with pytest.raises(ConfigError, match="DecayCallback counts epochs, but the rows have no length"):
        endless.train()
