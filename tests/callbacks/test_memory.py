from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from setup_runs import Rows, batch, llama, trainer, wrap
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_ptune.callbacks import GuardCallback, MemoryCallback
from hf_ptune.callbacks.memory import count_tokens, process_bytes
from hf_ptune.errors import PTuneError

KEYS = {"mem_rss_mib", "mem_rss_peak_mib", "mem_backbone_mib", "mem_adapter_mib", "mem_gradients_mib"}
KEYS |= {"mem_optimizer_mib", "step_time_s", "tokens_per_second"}
MIB = 1024 * 1024


class Tracker(TrainerCallback):
    """Keep copies of the logs as a tracker of report_to receives them."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_numbers_reach_history_trackers_and_metrics(tmp_path: Path) -> None:
    before, after, memory = Tracker(), Tracker(), MemoryCallback()
    run = trainer(wrap(llama()), tmp_path, [before, memory, after])
    output = run.train()
    for seen in (run.state.log_history, before.logs, after.logs):
        assert len(seen) == 5
        assert all(log.keys() >= KEYS for log in seen)
    assert output.metrics.keys() >= KEYS
    assert before.logs == [{k: v for k, v in log.items() if k != "step"} for log in run.state.log_history]
    order = [type(c).__name__ for c in run.callback_handler.callbacks]
    assert order[0] == "MemoryCallback" and len(order) == len(set(order)) + 1


def test_evaluation_and_other_logs_are_left_alone(tmp_path: Path) -> None:
    run = trainer(wrap(llama()), tmp_path, [MemoryCallback()], eval_strategy="steps", eval_steps=2)
    run.train()
    evaluated = [log for log in run.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2 and not any(k.startswith("mem_") for log in evaluated for k in log)
    run.log({"loss": 1.0})
    assert "mem_rss_mib" not in run.state.log_history[-1]
    assert run.evaluate(metric_key_prefix="train")["train_loss"] and "mem_rss_mib" not in run.state.log_history[-1]


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    model, memory = wrap(llama()), MemoryCallback()
    run = trainer(model, tmp_path, [memory])
    run.train()
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    backbone = [*model.backbone.parameters(), *model.backbone.buffers()]
    summary = {k: v * MIB for k, v in memory.summary.items() if isinstance(v, float)}
    assert summary["adapter"] == summary["gradients"] == adapter
    assert summary["backbone"] == sum(t.numel() * t.element_size() for t in backbone)
    steps = sum(1 for s in run.optimizer.state.values() for v in s.values() if v.dim() == 0)
    assert summary["optimizer"] == 2 * adapter + 4 * steps
    assert summary["rss_peak"] >= summary["rss"] > MIB
    assert "activations" not in memory.summary and memory.summary["device"] == "cpu"
    assert memory.summary["world_size"] == len(memory.summary["per_rank"]) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("counted", ["no", "all", "non_padding"])
def test_tokens_are_those_of_training(tmp_path: Path, counted: str, accumulation: int) -> None:
    memory = MemoryCallback()
    run = trainer(
        wrap(llama()),
        tmp_path,
        [memory, GuardCallback()],
        include_num_input_tokens_seen=counted,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    # an epoch of 16 rows: 7 tokens each, 2 of every second row padding
    expected = 16 * 7 if counted == "all" else 8 * 7 + 8 * 5
    assert memory._total.tokens == expected and memory._total.steps == 4
    final = run.state.log_history[-1]
    assert final["tokens_per_second"] == pytest.approx(expected / memory._total.seconds)
    assert final["step_time_s"] == pytest.approx(memory._total.seconds / 4)


@pytest.mark.parametrize("counted", ["no", "all"])
def test_seconds_are_those_from_a_step_s_start_to_its_end(
    tmp_path: Path, counted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([0.0, 2.0, 10.0, 13.0, 20.0, 25.0, 40.0, 47.0])  # a start and an end each, with pauses between
    monkeypatch.setattr("hf_ptune.callbacks.memory.time", SimpleNamespace(perf_counter=lambda: next(readings)))
    rows = Rows()
    rows.mask[:] = 1
    run = trainer(wrap(llama()), tmp_path, [MemoryCallback()], rows, include_num_input_tokens_seen=counted)
    run.train()
    logs = run.state.log_history
    assert [log["step_time_s"] for log in logs] == [2, 3, 5, 7, 17 / 4]
    assert [log["tokens_per_second"] for log in logs] == [28 / 2, 28 / 3, 28 / 5, 28 / 7, 112 / 17]


@pytest.mark.parametrize("counted", ["no", "all"])
def test_every_epoch(tmp_path: Path, counted: str) -> None:
    settings = {"max_steps": 8, "logging_steps": 3, "include_num_input_tokens_seen": counted}
    run = trainer(wrap(llama()), tmp_path, [MemoryCallback("epoch")], **settings)
    run.train()
    steps = [log["step"] for log in run.state.log_history if "mem_rss_mib" in log and "loss" in log]
    assert steps == [4, 8] and "mem_rss_mib" in run.state.log_history[-1]
    assert [log["step"] for log in run.state.log_history if "loss" in log] == [3, 4, 6, 8]


def test_table_is_printed_once_and_aligned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = MemoryCallback()
    assert memory.table() == ""
    trainer(wrap(llama()), tmp_path, [memory], disable_tqdm=False).train()
    table = memory.table()
    assert capsys.readouterr().out.count(table) == 1
    lines = table.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "MiB",
        "process, resident",
        "process, peak resident",
        "backbone",
        "adapter",
        "gradients",
        "optimizer state",
        "activations",
        "step time, ms",
        "tokens per second",
    ]
    assert len({len(line) for line in lines}) == 1 and "not told on CPU" in table


def test_training_is_left_as_it_was_after_the_end(tmp_path: Path) -> None:
    model, memory = wrap(llama()), MemoryCallback()
    hooks = len(model._forward_pre_hooks)
    run = trainer(model, tmp_path, [memory])
    run.train()
    run.train()
    assert len(model._forward_pre_hooks) == hooks
    assert memory._total.steps == 4


def test_resume_counts_its_own_steps(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "include_num_input_tokens_seen": "all"}
    trainer(wrap(llama()), tmp_path, [MemoryCallback()], **settings).train()
    memory = MemoryCallback()
    run = trainer(wrap(llama()), tmp_path, [memory], **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert memory._total.steps == 2 and memory._total.tokens == 8 * 7
    assert [log["step"] for log in run.state.log_history if "mem_rss_mib" in log] == [1, 2, 3, 4, 4]


class Summing(nn.Module):
    """A model of the user's own, without a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.base = nn.Linear(7, 1), nn.Linear(7, 7).requires_grad_(False)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        return {"loss": self.head(self.base(input_ids.float())).mean()}


def test_a_model_without_prompt_is_measured_by_what_trains(tmp_path: Path) -> None:
    memory = MemoryCallback()
    trainer(Summing(), tmp_path, [memory], trainer_class=Trainer).train()
    assert memory.summary["adapter"] * MIB == 8 * 4 and memory.summary["backbone"] * MIB == 56 * 4


class Fading(Summing):
    """The first of its steps alone has gradients for what is `extra`."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.calls = nn.Linear(7, 3), 0

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        loss = super().forward(input_ids, attention_mask, labels)["loss"]
        self.calls += 1
        return {"loss": loss + self.extra(input_ids.float()).mean() if self.calls == 1 else loss}


def test_gradients_are_the_most_that_an_update_found(tmp_path: Path) -> None:
    memory = MemoryCallback()
    run = trainer(Fading(), tmp_path, [memory], trainer_class=Trainer, logging_steps=4)
    run.train()
    assert run.model.extra.weight.grad is None
    assert memory.summary["gradients"] * MIB == (8 + 24) * 4


def test_the_peak_outlasts_what_is_let_go() -> None:
    held = torch.ones(24 * MIB)  # 96 MiB
    most = process_bytes()[0]
    del held
    now, peak = process_bytes()
    assert now < most - 64 * MIB and peak > most - 8 * MIB


def test_a_wrong_interval_is_refused() -> None:
    with pytest.raises(PTuneError, match='expected "log" or "epoch"'):
        MemoryCallback("step")


def test_positional_inputs_and_embeddings_are_counted() -> None:
    inputs = batch(Rows())
    assert int(count_tokens(inputs)) == 12
    assert count_tokens({"input_ids": inputs["input_ids"]}) == 14
    assert count_tokens({"inputs_embeds": torch.zeros(2, 7, 32)}) == 14
    assert count_tokens({}) == 0


def test_tokens_of_all_choices_are_counted() -> None:
    ids, mask = torch.ones(2, 3, 7, dtype=torch.long), torch.ones(2, 3, 7, dtype=torch.long)
    mask[:, :, 5:] = 0
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 30
    assert count_tokens({"input_ids": ids}) == 42
    assert count_tokens({"inputs_embeds": torch.zeros(2, 3, 7, 32)}) == 42
    # a packed row, with a mask of who attends to whom
    assert count_tokens({"input_ids": ids[0], "attention_mask": torch.ones(3, 7, 7)}) == 21


def test_device_numbers_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {"memory_allocated": 30, "memory_reserved": 64, "max_memory_allocated": 1000}
    for name, mib in readings.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, mib=mib: mib * MIB)
    memory, model = MemoryCallback(), nn.Linear(256, 1024, bias=False)  # 1 MiB
    memory._devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    memory._gradients = 9 * MIB
    found = {k: v / MIB for k, v in memory._memory(model, None).items()}
    assert (found["device_allocated"], found["device_reserved"], found["device_peak"]) == (60, 128, 2000)
    assert found["activations"] == 2000 - 1 - 9
