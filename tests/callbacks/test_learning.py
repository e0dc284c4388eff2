"""The watch on learning: runs that do not learn are told so once, with the cure; runs that learn are left alone."""

import copy
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from setup_runs import Rows, bert, llama, trainer, wrap
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as hf_logging

from hf_ptune import FreezeBackboneCallback, LearningCallback, MemoryCallback, PTunePreTrainedModel
from hf_ptune.adapter_file import mark_fresh
from hf_ptune.callbacks.trend import Losses
from hf_ptune.defaults import defaults_of
from hf_ptune.errors import PTuneError

STEPS = 80


class Learnable(Rows):
    """The label is the half of the vocabulary that the first token is from."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"labels": torch.tensor(int(self.ids[index, 0] > 25))}


class Noise(Rows):
    """Labels that change every time: there is nothing to learn."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"labels": torch.randint(3, ())}


class TwoWords(Rows):
    """Text of two words only, which a prompt can say."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index] % 2 + 1
        return super().__getitem__(index) | {"input_ids": ids, "labels": ids}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Warnings of the callback, as the user would see them."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler, log = Handler(logging.WARNING), hf_logging.get_logger("hf_ptune.callbacks.learning")
    level = log.level
    log.setLevel(logging.WARNING)
    log.addHandler(handler)
    yield seen
    log.removeHandler(handler)
    log.setLevel(level)


def usual(method: str) -> str:
    """The method's own learning rate, as a message says it."""
    return f"{defaults_of(method).training['learning_rate']:.2g}"


def watched(folder: Path, method: str = "p_tuning_v2", **settings: Any) -> tuple[LearningCallback, Trainer]:
    callback = LearningCallback(settings.pop("usual", None))
    model = settings.pop("model", None) or wrap(bert(), method)
    rows = settings.pop("rows", None) or Learnable(64)
    given = {"max_steps": STEPS, "logging_steps": 500, "weight_decay": 0.0, "per_device_train_batch_size": 8}
    run = trainer(model, folder, [FreezeBackboneCallback(), callback], rows=rows, **(given | settings))
    run.train()
    return callback, run


@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning", "prompt_tuning", "p_tuning", "bitfit"])
def test_a_normal_run_raises_no_alarm(method: str, tmp_path: Path, warnings: list[str]) -> None:
    rate = defaults_of(method).training["learning_rate"]
    callback, run = watched(tmp_path, method, learning_rate=rate, warmup_steps=0.06)
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[-1] < losses[0], losses
    assert not callback.found and not warnings
    assert set(callback.summary) == {"prompt_change"} and callback.summary["prompt_change"] > 0.01


def test_language_models_raise_no_alarm(tmp_path: Path) -> None:
    callback, _ = watched(tmp_path, model=wrap(llama()), rows=TwoWords(64), learning_rate=2e-2)
    assert not callback.found


@pytest.mark.parametrize(("rate", "counted"), [(3.0, "no"), (1e30, "no"), (3.0, "all")])
def test_too_high(rate: float, counted: str, tmp_path: Path, warnings: list[str]) -> None:
    callback, run = watched(tmp_path, learning_rate=rate, include_num_input_tokens_seen=counted)
    assert list(callback.found) == ["too_high"] and len(warnings) == 1
    assert (
        "Lower the learning rate" in warnings[0]
        and f"about {usual('p_tuning_v2')}" in warnings[0]
        and f"of {STEPS}: the l" in warnings[0]
    )
    assert run.state.log_history[-1]["learning_too_high"] == callback.summary["learning_too_high"] > 0


def test_a_low_first_loss_is_no_rise(tmp_path: Path, warnings: list[str]) -> None:
    """Single rows without order: the loss of one step says little."""
    torch.manual_seed(0)
    for seed in range(6):
        backbone = bert(initializer_range=0.5)
        settings = {"learning_rate": 1e-6, "per_device_train_batch_size": 1, "seed": seed, "max_steps": 40}
        callback, _ = watched(tmp_path, model=wrap(backbone), rows=Noise(64), **settings)
        assert list(callback.found) == ["too_low"]
    assert not any("Lower" in w for w in warnings)


def test_noise_is_no_rise() -> None:
    """Losses without any trend, of a prompt that moves: hardly one run in twenty is told to have risen."""
    made = torch.Generator().manual_seed(0)
    found = 0
    for number in range(100):
        losses = torch.randn(400, generator=made).mul(0.2 * (1 + number % 5)).exp()
        callback = LearningCallback()
        callback._losses[""] = seen = Losses()
        risen = []
        for start, end in zip((0, *range(1, 400, 20)), range(1, 400, 20), strict=False):
            seen.add(losses[start:end].mean().item(), end)
            risen.append(end > 100 and callback._has_risen(short=False, lost=False))
        found += any(risen)
    assert found <= 5


def replayed(
    losses: list[float], every: int, change: float, rate: float, usual: float, ended: bool = False
) -> LearningCallback:
    """The callback that has seen losses logged, the first of them at the first step, of a prompt that has moved so."""
    callback, model = LearningCallback(usual), wrap(bert())
    total = every * (len(losses) - 1)
    arguments = TrainingArguments("out", max_steps=total, report_to=[], use_cpu=True)
    state = TrainerState(max_steps=total)
    callback.on_train_begin(arguments, state, TrainerControl(), model=model)
    with torch.no_grad():
        model.prompt.weight.mul_(1 + change)
    for number, loss in enumerate(losses):
        state.global_step = every * number or 1
        logs = {"loss": loss, "learning_rate": rate}
        callback.on_log(arguments, state, TrainerControl(), logs=logs, model=model)
    if ended:
        callback.on_log(arguments, state, TrainerControl(), logs={"total_flos": 1.0}, model=model)
    return callback


# MiniLM on SST-2 and a tiny BERT, at 50 and 75 times the usual rate
BLOWN_UP = [
    [0.69, 0.82, 3.76, 1.55, 3.31, 1.42, 1.33, 1.73, 1.6, 1.15, 1.67, 0.89, 1.28, 0.98, 0.96, 0.8, 0.72, 0.81, 0.84],
    [1.24, 6.41, 8.78, 6.75, 14.96, 6.14, 1.28, 6.9, 4.44, 1.24, 1.63, 1.81, 0.88, 2.55, 5.19, 4.13, 2.32, 0.93, 0.85],
]


@pytest.mark.parametrize("losses", BLOWN_UP)
def test_noise_that_a_far_rate_makes_hides_no_rise(losses: list[float]) -> None:
    assert list(replayed(losses, 6, 8.0, rate=2.0, usual=0.04).found) == ["too_high"]
    assert not replayed(losses, 6, 0.5, rate=2.0, usual=0.04).found  # what has hardly moved has blown nothing up


# a tiny BERT on labels without a rule: a first step worse than chance, and then chance
STUCK = [0.997, 0.86, 0.74, 0.73, 0.716, 0.707, 0.703, 0.7, 0.706, 0.695, 0.702, 0.692, 0.698, 0.693, 0.69, 0.689]


@pytest.mark.parametrize(("of_chance", "found"), [(1.0, ["flat"]), (0.9, []), (1.1, [])])
def test_coming_down_to_chance_is_no_learning(of_chance: float, found: list[str]) -> None:
    scale = of_chance * math.log(3) / math.log(2)  # a head of three classes
    assert list(replayed([scale * loss for loss in STUCK], 20, 0.5, rate=0.04, usual=0.04).found) == found


def test_runs_that_learn_are_not_flat_beside_chance() -> None:
    """Noisy losses of classes, from above chance to half of it, or to nine tenths: knowing chance adds few alarms."""
    alarms = {0.5: [0, 0], 0.9: [0, 0]}
    for seed, end in itertools.product(range(200), alarms):
        made = torch.Generator().manual_seed(seed)
        noise = 0.1 * (1 + seed % 3)
        steps = torch.arange(400) / (20, 60, 100)[seed % 3]
        losses = math.log(2) * (end + (1.3 - end) * (-steps).exp())
        losses = losses * (torch.randn(400, generator=made) * noise - noise**2 / 2).exp()
        for known in (False, True):
            callback = LearningCallback()
            callback._losses[""] = seen = Losses(math.log(2) if known else math.inf)
            flat = []
            for start, stop in zip((0, *range(1, 400, 20)), range(1, 400, 20), strict=False):
                seen.add(losses[start:stop].mean().item(), stop)
                flat.append(stop > 200 and callback._is_flat())
            alarms[end][known] += any(flat)
    assert alarms[0.5] == [0, 0] and alarms[0.9][1] <= alarms[0.9][0] + 10, alarms


@pytest.mark.parametrize("settings", [{"per_device_train_batch_size": 1}, {"warmup_steps": 0.06}])
def test_what_blows_up_is_told_soon(settings: dict[str, Any], tmp_path: Path) -> None:
    callback, _ = watched(tmp_path, learning_rate=3.0, **settings)
    assert list(callback.found) == ["too_high"] and callback.summary["learning_too_high"] <= STEPS / 2


def test_steps_without_a_label_do_not_count(tmp_path: Path) -> None:
    class Unlabelled(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            labels = torch.full_like(self.ids[index], -100) if index % 4 == 0 else self.ids[index]
            return super().__getitem__(index) | {"labels": labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    callback, rows = LearningCallback(), Unlabelled(64)
    settings = {"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 1}
    run = trainer(wrap(llama()), tmp_path, [callback], rows, InOrder, **settings)
    run.train()
    assert next(e["loss"] for e in run.state.log_history) == 0 and "too_high" not in callback.found
    assert callback._losses[""].steps[0] == 2


@pytest.mark.parametrize("rate", [0.0, 1e-9, 1e-5])
def test_too_low(rate: float, tmp_path: Path, warnings: list[str]) -> None:
    callback, run = watched(tmp_path, learning_rate=rate)
    assert list(callback.found) == ["too_low"] and len(warnings) == 1
    assert f"Raise the learning rate from {rate:.2g} to about {usual('p_tuning_v2')}" in warnings[0]
    assert "too_high" not in str(run.state.log_history) and run.state.log_history[-1]["learning_too_low"] >= 20


def test_a_prompt_that_nothing_updates(tmp_path: Path, warnings: list[str]) -> None:
    model = wrap(bert())
    head = [p for n, p in model.named_parameters() if "classifier" in n]
    optimizer = torch.optim.AdamW(head, lr=2e-2)
    callback, _ = LearningCallback(), None
    run = trainer(model, tmp_path, [callback], Learnable(64), optimizers=(optimizer, None), max_steps=STEPS)
    run.train()
    assert list(callback.found) == ["too_low"] and len(warnings) == 1
    assert "changed by 0 %" in warnings[0] and "gets no update" in warnings[0]


@pytest.mark.parametrize("usual", [None, 2e-2])  # that of a recipe's method
@pytest.mark.parametrize(("rate", "cure"), [(1e-4, "from 0.0001 to about 0.001"), (0.0, "from 0 above it")])
def test_rates_of_other_optimizers_are_not_told_by_adams(
    rate: float, cure: str, usual: float | None, tmp_path: Path, warnings: list[str]
) -> None:
    callback, _ = watched(tmp_path, learning_rate=rate, optim="sgd", usual=usual)
    assert list(callback.found) == ["too_low"] and f"Raise the learning rate {cure}" in warnings[0]


def test_bitfit_is_told_of_without_a_prompt(tmp_path: Path, warnings: list[str]) -> None:
    callback, run = watched(tmp_path, "bitfit", learning_rate=1e-7)
    assert list(callback.found) == ["too_low"] and "the adapter has changed by" in warnings[0]
    callback._rate = 3e-3
    cure = callback._unstick(run.model, change=0.2)
    assert "The adapter has changed by 20 %" in cure and "virtual tokens" not in cure


def test_an_adapter_of_further_modules_alone_is_watched_by_these(tmp_path: Path) -> None:
    model = wrap(bert(), "bitfit", modules_to_save=["bert"])
    run = trainer(model, tmp_path, [LearningCallback()], Rows(classes=3), max_steps=2)
    run.train()
    assert run.state.log_history[-1]["prompt_change"] > 0


def test_a_flat_loss(tmp_path: Path, warnings: list[str]) -> None:
    callback, run = watched(tmp_path, rows=Noise(64), learning_rate=5e-3)
    assert list(callback.found) == ["flat"] and len(warnings) == 1
    assert "no fall beyond its noise" in warnings[0] and "labels belong to their rows" in warnings[0]
    assert run.state.log_history[-1]["learning_flat"] >= STEPS / 2


def test_a_network_hides_a_rate_that_is_too_low(tmp_path: Path, warnings: list[str]) -> None:
    """Behind an MLP the prompt moves all the same: the flat loss tells, and the cure is a higher rate."""
    callback, _ = watched(tmp_path, "p_tuning", learning_rate=1e-5)
    assert list(callback.found) == ["flat"] and callback.summary["prompt_change"] > 3e-3
    assert f"Raise the learning rate from 1e-05 to about {usual('p_tuning')}" in warnings[0]


def test_a_start_at_zero_is_measured_too(tmp_path: Path) -> None:
    callback, _ = watched(tmp_path, model=wrap(bert(), prompt_tuning_init="ZERO"), learning_rate=2e-2)
    assert not callback.found and 0.01 < callback.summary["prompt_change"] < 10


def test_training_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [LearningCallback()]):
        model = wrap(bert(), "prefix_tuning", encoder_dropout=0.1, prefix_dropout=0.1)
        run = trainer(model, tmp_path, callbacks, Learnable(64), max_steps=25, logging_steps=5)
        run.train()
        ends.append((model.prompt().detach(), run.state.log_history[-1]["train_loss"]))
    assert torch.equal(ends[0][0], ends[1][0]) and abs(ends[0][1] - ends[1][1]) < 1e-6


def test_short_runs_are_judged_at_their_end_where_they_are_clear(tmp_path: Path) -> None:
    callback, run = watched(tmp_path, learning_rate=1e-9, max_steps=10)
    assert list(callback.found) == ["too_low"] and callback.summary["learning_too_low"] == 10
    assert [e["step"] for e in run.state.log_history if "loss" in e] == list(range(1, 11))
    callback, _ = watched(tmp_path, learning_rate=1e3, max_steps=16, warmup_steps=0)
    assert list(callback.found) == ["too_high"]
    for settings in ({"learning_rate": 2e-2, "max_steps": 10}, {"learning_rate": 1e-9, "max_steps": 4}):
        assert not watched(tmp_path, **settings)[0].found


def test_silent_runs_are_judged_by_their_last_log(tmp_path: Path) -> None:
    callback, run = watched(tmp_path, learning_rate=1e-9, logging_strategy="no")
    assert list(callback.found) == ["too_low"]  # told by the log that ends training
    assert not [e for e in run.state.log_history if "loss" in e]


def test_silent_runs_are_told_their_rate(tmp_path: Path, warnings: list[str]) -> None:
    watched(tmp_path, learning_rate=1e-6, logging_strategy="no")
    assert "Raise the learning rate from 1e-06" in warnings[0]


def test_a_loss_that_falls_late_is_not_flat_in_the_end(warnings: list[str]) -> None:
    flat = [0.70, 0.69, 0.70, 0.69, 0.70, 0.70, 0.69, 0.70, 0.69, 0.70, 0.69, 0.68]
    callback = replayed(flat, 5, change=0.2, rate=2e-2, usual=2e-2, ended=True)
    assert list(callback.found) == ["flat"]
    falling = [0.6, 0.5, 0.4, 0.3, 0.25, 0.22, 0.2, 0.2]
    callback = replayed(flat + falling, 5, change=0.2, rate=2e-2, usual=2e-2, ended=True)
    assert not callback.found and "learning_flat" not in callback.summary and "has fallen since" in warnings[-1]


def test_a_rate_far_above_the_usual_is_never_called_flat(tmp_path: Path, warnings: list[str]) -> None:
    watched(tmp_path, "prompt_tuning", rows=Noise(64), learning_rate=1e3)
    assert warnings and all("Lower the learning rate" in w for w in warnings)


def test_a_run_that_goes_on_is_not_judged_by_its_rest(tmp_path: Path, warnings: list[str]) -> None:
    settings = {"learning_rate": 2e-2, "max_steps": 120, "save_strategy": "steps", "save_steps": 90}
    _, run = watched(tmp_path, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-90"))
    assert not warnings


def converged(folder: Path) -> PTunePreTrainedModel:
    """A model that has learnt all there is; what is left of its losses is noise."""
    run = trainer(wrap(bert()), folder, [], Learnable(64), max_steps=STEPS, learning_rate=2e-2)
    run.train()
    return run.model


def from_folder(model: PTunePreTrainedModel, folder: Path) -> PTunePreTrainedModel:
    """As a loaded adapter says where it is from."""
    fresh = wrap(bert())
    fresh.load_adapter_state_dict(model.adapter_state_dict())
    model.save_pretrained(folder)
    vars(fresh)["_ptune_source"] = str(folder), {}
    return fresh


def started_from(model: PTunePreTrainedModel, folder: Path) -> PTunePreTrainedModel:
    model.save_pretrained(folder)
    return wrap(bert(), prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter=str(folder))


@pytest.mark.parametrize("go_on", [lambda model, folder: copy.deepcopy(model), from_folder, started_from])
@pytest.mark.parametrize("rate", [1e-6, 1e-3])
def test_a_trained_prompt_that_goes_on_is_no_fresh_start(
    tmp_path: Path, warnings: list[str], go_on: Any, rate: float
) -> None:
    model = go_on(converged(tmp_path), tmp_path / "adapter")
    callback, _ = watched(tmp_path, model=model, rows=Noise(64), learning_rate=rate)
    assert not callback.found and not warnings


def test_a_fresh_adapter_that_was_loaded_is_a_fresh_start(tmp_path: Path) -> None:
    """As `hf-ptune init` writes it."""
    model = wrap(bert())
    model.save_pretrained(tmp_path / "fresh")
    mark_fresh(tmp_path / "fresh")
    vars(model)["_ptune_source"] = str(tmp_path / "fresh"), {}
    callback, _ = watched(tmp_path, model=model, learning_rate=1e-9)
    assert list(callback.found) == ["too_low"]


def test_a_prompt_that_did_not_learn_is_judged_anew(tmp_path: Path) -> None:
    model = wrap(bert())
    for _ in range(2):
        callback, _ = watched(tmp_path, model=model, learning_rate=1e-9)
        assert list(callback.found) == ["too_low"]


def test_a_few_steps_on_trial_leave_a_fresh_start(tmp_path: Path) -> None:
    model = wrap(bert())
    trainer(model, tmp_path, [], Learnable(64), max_steps=3, learning_rate=1e-9).train()
    callback, _ = watched(tmp_path, model=model, learning_rate=1e-9)
    assert list(callback.found) == ["too_low"]


def test_models_without_a_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PTuneError, match="LearningCallback found BertForSequenceClassification.*get_ptune_model"):
        trainer(bert(), tmp_path, [LearningCallback()], Rows(classes=3)).train()


def test_trackers_receive_what_is_measured(tmp_path: Path) -> None:
    class Tracker(TrainerCallback):
        logs: ClassVar[list[dict[str, Any]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    run = trainer(wrap(bert()), tmp_path, [Tracker(), LearningCallback(), MemoryCallback()], Rows(classes=3))
    run.train()
    assert len(Tracker.logs) == 5
    assert all("prompt_change" in log and "mem_rss_mib" in log for log in Tracker.logs)
    order = [type(c).__name__ for c in run.callback_handler.callbacks]
    assert order[:2] == ["LearningCallback", "MemoryCallback"] and order.index("DefaultFlowCallback") == 2


def test_own_logs_are_enough(tmp_path: Path) -> None:
    _, run = watched(tmp_path, learning_rate=2e-2, max_steps=60, logging_steps=2)
    steps = [e["step"] for e in run.state.log_history if "loss" in e]
    assert set(range(2, 61, 2)) <= set(steps)
    assert all("prompt_change" in e for e in run.state.log_history if "loss" in e)


def test_a_second_training_starts_anew(tmp_path: Path, warnings: list[str]) -> None:
    callback, run = watched(tmp_path, learning_rate=1e-9)
    run.args.learning_rate, run.optimizer, run.lr_scheduler = 2e-2, None, None
    run.train()
    assert not callback.found and len(warnings) == 1


def test_facts_of_a_run_have_it(tmp_path: Path) -> None:
    from hf_ptune.callbacks import ModelCardCallback

    card, model = ModelCardCallback(), wrap(bert())
    callbacks = [MemoryCallback(), LearningCallback(), card]
    trainer(model, tmp_path, callbacks, Learnable(64), max_steps=STEPS, learning_rate=1e-9).train()
    assert card.facts is not None and card.facts.history[-1]["learning_too_low"] >= 20
    json.dumps(card.facts.history, allow_nan=False)
