"""SIGTERM: what a run keeps when its machine is taken away, and that it goes on as if it had not been."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from launch import command, environment
from test_train import write_base, write_recipe
from transformers import TrainerCallback

from hf_ptune import evaluation, sweep, train, train_multitask
from hf_ptune.cards import RunFacts
from hf_ptune.cli import main
from hf_ptune.data import load_rows
from hf_ptune.engines import is_whole
from hf_ptune.errors import Terminated
from hf_ptune.recipe import make_recipe

RECIPE = {"save_strategy": "no", "max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 1}


class Terminator(TrainerCallback):
    """Send SIGTERM to this process within a step, when its dropout has drawn."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def terminated(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Runs that get SIGTERM in their third step."""
    with monkeypatch.context() as patch:
        for module in ("train", "train_multitask"):
            patch.setattr(f"hf_ptune.{module}.scheduling", lambda recipe: [Terminator(3)])
        yield patch
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe whose frozen base drops out."""
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    found = write_recipe(tmp_path, "SEQ_CLS", base, options={"num_virtual_tokens": 4, "backbone_dropout": True})
    found["training"] |= RECIPE
    return found


def write(content: dict[str, Any], tmp_path: Path, **training: Any) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(content | {"training": content["training"] | training}))
    return str(path)


def test_sigterm_says_how_to_go_on(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told_twice(recipe: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            os.kill(os.getpid(), signal.SIGTERM)
            survived.append(recipe.seed)
            raise

    survived: list[int] = []
    monkeypatch.setattr("hf_ptune.train.run", told_twice)
    assert main(["train", write(content, tmp_path)]) == 143
    assert capsys.readouterr().err.endswith("before a checkpoint was written; the same command starts anew.\n")
    assert survived == [0]
    monkeypatch.setattr(sweep, "_train", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    grid = ["--learning-rates", "1e-2", "--lengths", "2", "--folder", str(tmp_path / "grid")]
    assert main(["sweep", write(content, tmp_path), *grid]) == 143
    assert capsys.readouterr().err.endswith("the same command goes on with the runs that are left.\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["train", write(content, tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_at_sigterm_goes_on_bit_for_bit(
    content: dict[str, Any], tmp_path: Path, terminated: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(content, tmp_path, enable_jit_checkpoint=True), tmp_path / "out"
    assert main(["train", path]) == 143
    assert f"goes on from {out / 'checkpoint-3'}.\n" in capsys.readouterr().err
    assert [p.name for p in out.glob("*")] == ["checkpoint-3"] and is_whole(out / "checkpoint-3")
    terminated.undo()
    further = "--training.resume_from_checkpoint=true"
    assert main(["train", path, further, "--seed=1"]) == 2 and "seed is 0 there" in capsys.readouterr().err
    assert main(["train", path, further]) == 0
    whole = tmp_path / "whole"
    assert main(["train", path, f"--output_dir={whole}"]) == 0
    adapters = [(folder / "adapter" / "model.safetensors").read_bytes() for folder in (out, whole)]
    assert adapters[0] == adapters[1]


def trained(folder: Path) -> tuple[bytes, set[tuple[int, str, float]]]:
    """The adapter of a run, and what was logged and measured at which step; again where it went on."""
    names = ("loss", "learning_rate", "eval_loss", "eval_accuracy")
    history = RunFacts.load(folder / "adapter").history
    told = {(entry["step"], name, entry[name]) for entry in history for name in names if name in entry}
    return (folder / "adapter" / "model.safetensors").read_bytes(), told


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10}}
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
EPOCHS = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 12, "eval_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}


@pytest.mark.parametrize(
    "training",
    [
        PLATEAU | STEPS,
        BEST | EPOCHS | {"save_strategy": "epoch", "logging_strategy": "epoch"},
        BEST | EPOCHS | {"save_strategy": "epoch", "max_steps": 3, "save_total_limit": 1, "learning_rate": 10.0},
        BEST | STEPS | {"save_strategy": "best", "save_total_limit": 1, "learning_rate": 10.0},
        BEST | EPOCHS | {"save_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1},
        STEPS | {"max_steps": 3, "eval_steps": 2},
        {"eval_strategy": "epoch", "max_steps": 3},
    ],
    ids=[
        "plateau",
        "end of an epoch",
        "last step",
        "none but the best",
        "whole epochs",
        "last step, steps",
        "last step, epoch",
    ],
)
def test_a_step_that_measures_is_measured_before_its_checkpoint(
    training: dict[str, Any],
    content: dict[str, Any],
    tmp_path: Path,
    terminated: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = write(content, tmp_path, enable_jit_checkpoint=True, **training), tmp_path / "out"
    assert main(["train", path]) == 143
    assert f"goes on from {out / 'checkpoint-3'}.\n" in capsys.readouterr().err
    assert not (out / "adapter").exists()
    logged = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert any(e["step"] == 3 and "eval_loss" in e for e in logged)
    assert json.loads((out / "checkpoint-3" / "ptune_run.json").read_text())
    terminated.undo()
    assert main(["train", path, "--training.resume_from_checkpoint=true"]) == 0
    whole = tmp_path / "whole"
    assert main(["train", path, f"--output_dir={whole}"]) == 0
    assert trained(out) == trained(whole)


class WhileMeasuring(TrainerCallback):
    """Send SIGTERM to this process in the evaluation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class AtTheEnd(TrainerCallback):
    """Send SIGTERM to this process when the last step has been taken and measured."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("training", [STEPS, EPOCHS | {"max_steps": 4}])
def test_sigterm_while_a_training_measures_or_ends_is_heeded(
    training: dict[str, Any], content: dict[str, Any], tmp_path: Path, terminated: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    path = write(content, tmp_path, enable_jit_checkpoint=True, **training)
    steps = json.loads(Path(path).read_text())["training"]["max_steps"]
    for callback, kept in ((AtTheEnd(), []), (WhileMeasuring(steps), [f"checkpoint-{steps}"])):
        terminated.setattr("hf_ptune.train.scheduling", lambda recipe, callback=callback: [callback])
        assert main(["train", path]) == 143
        assert [p.name for p in out.glob("checkpoint-*")] == kept
    terminated.undo()
    assert main(["train", path, "--training.resume_from_checkpoint=true"]) == 0
    assert main(["train", path, f"--output_dir={tmp_path / 'whole'}"]) == 0
    assert trained(out) == trained(tmp_path / "whole")


def test_what_fails_leaves_sigterm_as_it_was(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a Trainer has been made, and within its training."""
    content["training"] |= {"enable_jit_checkpoint": True}
    several = {k: v for k, v in content.items() if k not in ("task", "data")}
    several["tasks"] = [{"name": "one", "task": content["task"], "data": content["data"]}]
    error = RuntimeError("no")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for place in ("{}.check_batches", "{}.train_on", "train.Trainer.training_step"):
        for module in ("train", "train_multitask"):
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="^no$"):
                patch.setattr(f"hf_ptune.{place.format(module)}", fail)
                if module == "train":
                    train.run(make_recipe(content, folder=tmp_path))
                else:
                    train_multitask.run(train_multitask.make_multitask_recipe(several, folder=tmp_path))
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_thread_trains_too(content: dict[str, Any], tmp_path: Path) -> None:
    """Signals are no matter of its own."""
    content["training"] |= {"enable_jit_checkpoint": True, "max_steps": 1}
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train.run, make_recipe(content, folder=tmp_path)).result().folder.is_dir()


def test_several_tasks_keep_a_checkpoint_after_they_have_been_measured(
    content: dict[str, Any], tmp_path: Path, terminated: pytest.MonkeyPatch
) -> None:
    content["tasks"] = [{"name": "one", "task": content.pop("task"), "data": content.pop("data")}]
    content["training"] |= {"enable_jit_checkpoint": True}
    with pytest.raises(Terminated):
        train_multitask.run(train_multitask.make_multitask_recipe(content, folder=tmp_path))
    assert [p.name for p in (tmp_path / "out").glob("*")] == ["checkpoint-3"]
    assert is_whole(tmp_path / "out" / "checkpoint-3")


def test_what_does_not_train_takes_no_sigterm(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the runs of a sweep, which ends as interrupted itself."""
    content["training"] |= {"enable_jit_checkpoint": True, "max_steps": 2}
    recipe = make_recipe(content, folder=tmp_path)
    found: list[Any] = []

    def look(*_: Any) -> dict[str, float]:
        found.append(signal.getsignal(signal.SIGTERM))
        return {"accuracy": 0.5}

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            look()

    assert main(["train", write(content, tmp_path)]) == 0
    monkeypatch.setattr(evaluation, "measure", look)
    monkeypatch.setattr("hf_ptune.train.scheduling", lambda recipe: [Look()])
    evaluation.evaluate(recipe)
    with sweep.HeldInterruptions():
        held = signal.getsignal(signal.SIGTERM)
        sweep._run(recipe, {"": load_rows(recipe)}, (1e-2, 2, 0))
    assert found == [signal.SIG_DFL, held, held]


@pytest.mark.slow
def test_ranks_that_are_told_at_different_steps_write_one_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    path = write(content, tmp_path, enable_jit_checkpoint=True, ddp_backend="gloo", max_steps=400)
    (tmp_path / "terminated.py").write_text(
        "import os, sys\n"
        "from test_interruption import Terminator\n"
        "from hf_ptune import train\n"
        "train.scheduling = lambda recipe: [Terminator(2)] if os.environ['RANK'] == '1' else []\n"
        "sys.stderr = open(f'{sys.argv[0]}.{os.environ[\"RANK\"]}', 'w', buffering=1)\n"  # ranks write at once
        "code = train.main(sys.argv[1:])\n"
        "print('left with', code, file=sys.stderr)\n"
        "train.leave(code)\n"
    )
    line = command("ddp", [tmp_path / "terminated.py", path])
    done = subprocess.run(line, env=environment("ddp"), capture_output=True, text=True, timeout=240)
    said = "".join(path.read_text() for path in tmp_path.glob("terminated.py.*"))
    assert said.count("left with 143") >= 1, done.stderr[-3000:]
    (checkpoint,) = (tmp_path / "out").glob("*")
    assert set(re.findall(r"goes on from (.*)\.\n", said)) == {str(checkpoint)}
    assert is_whole(checkpoint) and {p.name for p in checkpoint.glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
