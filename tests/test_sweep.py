"""A grid of length and learning rate: every run is kept, the best is found, an interrupted sweep goes on."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import ROWS, write_base, write_recipe

import hf_ptune.sweep as module
from hf_ptune.cards import RunFacts
from hf_ptune.cli import main
from hf_ptune.defaults import defaults_of
from hf_ptune.errors import RecipeError
from hf_ptune.recipe import Recipe, make_recipe, read_recipe
from hf_ptune.sweep import sweep
from hf_ptune.sweep_table import Sweep, Trial, report, write_table
from hf_ptune.train_multitask import make_multitask_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    content = write_recipe(tmp_path, "SEQ_CLS", base)
    content["training"] = content["training"] | {"num_train_epochs": 3}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return make_recipe(content, folder=tmp_path)


def trials(*rows: tuple[float, int, int, float | None]) -> Sweep:
    made = [
        Trial(rate, length, seed, {} if v is None else {"accuracy": v}, error="broke" if v is None else None)
        for rate, length, seed, v in rows
    ]
    return Sweep(made, "accuracy", "hf-ptune train r.yaml")


def test_a_grid_from_the_command_line(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    run = module._train

    def watched(chosen: Recipe, rows: Any) -> Any:
        seen.append((chosen.training["learning_rate"], chosen.options["num_virtual_tokens"], chosen.seed, rows))
        return run(chosen, rows)

    monkeypatch.setattr(module, "_train", watched)
    path, folder = str(tmp_path / "recipe.yaml"), tmp_path / "grid"
    command = ["sweep", path, "--learning-rates", "1e-3", "5e-2", "--lengths", "2", "4", "--folder", str(folder)]
    assert main([*command, "--data.split_seed=1", "--training.num_train_epochs=4"]) == 0
    assert [row[:3] for row in seen] == [(1e-3, 2, 0), (1e-3, 4, 0), (5e-2, 2, 0), (5e-2, 4, 0)]
    rows = seen[0][3][""]
    assert len(rows.held_out) > 0 and len(rows.train) + len(rows.held_out) == 30  # 10 of 40 stay unread
    printed = capsys.readouterr().out
    best = printed.splitlines()[-1]
    assert best.startswith(
        f"best: hf-ptune train {path} --data.split_seed=1 --training.num_train_epochs=4 --training.lea"
    )
    results = json.loads((folder / "results.json").read_text())["trials"]
    assert [t["error"] for t in results] == [None] * 4
    greatest = max(t["metrics"]["accuracy"] for t in results)
    chosen = [t for t in results if f"learning_rate={t['learning_rate']:g} " in best]
    assert greatest in [t["metrics"]["accuracy"] for t in chosen if best.endswith(f"={t['num_virtual_tokens']}")]
    table = (folder / "results.md").read_text()
    assert "| tokens |" in table and "sweep.png" in table and (folder / "sweep.png").stat().st_size > 1000
    assert not (folder / "trial").exists()
    assert main(["train", path, *best.split(path)[1].split(), f"--output_dir={tmp_path / 'best'}"]) == 0


def test_a_sweep_runs_in_one_process(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several would train a model of each one's own values together."""
    monkeypatch.setattr(module, "_train", lambda chosen, rows: ({"accuracy": 0.5}, {}))
    command = ["sweep", str(tmp_path / "recipe.yaml"), "--learning-rates", "1e-2", "--lengths", "2"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2 and not (tmp_path / "out-sweep").exists()
    assert "error: this is one of 2 processes (WORLD_SIZE), and a sweep runs in one" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")  # as launchers of one process set it
    assert main(command) == 0


def test_failures_stay_and_the_rest_goes_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, count = module._train, {"runs": 0}

    def sometimes(chosen: Recipe, rows: Any) -> Any:
        count["runs"] += 1
        if chosen.training["learning_rate"] == 0.5:
            raise torch.OutOfMemoryError("not enough of it")
        return run(chosen, rows)

    monkeypatch.setattr(module, "_train", sometimes)
    found = sweep(recipe, tmp_path / "grid", [0.5, 1e-2], [2])
    assert count["runs"] == 2 and "failed" in found.table() and found.best() == (1e-2, 2)
    assert "learning rate 0.5, 2 tokens, seed 0: failed: OutOfMemoryError: not enough of it" in report(found, tmp_path)
    assert "not enough of it" in (tmp_path / "grid" / "results.md").read_text()
    again = sweep(recipe, tmp_path / "grid", [0.5, 1e-2], [2, 3])
    assert count["runs"] == 4 and again.trials[2] == found.trials[1]  # only the new length is run
    sweep(recipe, tmp_path / "grid", [0.5], [2], retry=True)
    assert count["runs"] == 5


def test_an_interrupted_sweep_goes_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(rate: float) -> Any:
        return lambda chosen, rows: ({"accuracy": 0.5}, {})

    class Killed(BaseException):
        pass

    def stopping(error: type[BaseException]) -> Any:
        def train(chosen: Recipe, rows: Any) -> Any:
            if chosen.training["learning_rate"] == 2.0:
                raise error
            return {"accuracy": 0.5}, {}

        return train

    folder = tmp_path / "grid"
    monkeypatch.setattr(module, "_train", stopping(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, folder, [1.0, 2.0, 3.0], [2])
    assert len(json.loads((folder / "results.json").read_text())["trials"]) == 1

    def ended(chosen: Recipe, rows: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(module, "_train", ended)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, folder, [1.0, 2.0, 3.0], [2])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(json.loads((folder / "results.json").read_text())["trials"]) == 1
    monkeypatch.setattr(module, "_train", stopping(Killed))  # what no handler sees, as a kill by the system
    with pytest.raises(Killed):
        sweep(recipe, folder, [1.0, 2.0, 3.0], [2])
    monkeypatch.setattr(module, "_train", fake(0.5))
    found = sweep(recipe, folder, [1.0, 2.0, 3.0], [2])
    assert [t.error for t in found.trials] == [None, "the process ended during this run", None]
    found = sweep(recipe, folder, [1.0, 2.0, 3.0], [2], retry=True)
    assert [t.error for t in found.trials] == [None] * 3


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: a shell lets what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("at", "ran", "kept"), [(1, 0, 0), (2, 1, 0), (3, 1, 1)])
def test_an_interruption_while_results_are_written_is_no_failed_run(
    number: int, at: int, ran: int, kept: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a run, after an interruption of the run itself, and at its end."""
    write, count = module._write, {"writes": 0, "runs": 0}

    def written(*given: Any) -> None:
        count["writes"] += 1
        if count["writes"] == min(at, 2):
            os.kill(os.getpid(), number)
        write(*given)

    def train(chosen: Recipe, rows: Any) -> Any:
        count["runs"] += 1
        if at == 2:
            os.kill(os.getpid(), number)
            raise AssertionError("not interrupted")
        return {"accuracy": 0.5}, {}

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(module, "_write", written)
    monkeypatch.setattr(module, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "grid", [1.0, 2.0], [2])
    trials = json.loads((tmp_path / "grid" / "results.json").read_text())["trials"]
    assert [t["error"] for t in trials] == [None] * kept and count["runs"] == ran
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.setattr(module, "_train", lambda chosen, rows: ({"accuracy": 0.5}, {}))
    assert [t.error for t in sweep(recipe, tmp_path / "grid", [1.0, 2.0], [2]).trials] == [None, None]


def test_a_process_that_ignores_interruptions_keeps_ignoring_them(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the background of a shell script."""

    def train(chosen: Recipe, rows: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return {"accuracy": 0.5}, {}

    monkeypatch.setattr(module, "_train", train)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert sweep(recipe, tmp_path / "grid", [1.0], [2]).trials[0].error is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_recipe_s_results_are_not_mixed_in(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_train", lambda chosen, rows: ({"accuracy": 0.5}, {}))
    sweep(recipe, tmp_path / "grid", [1.0], [2])
    sweep(make_recipe_with(recipe, seed=3, training=recipe.training | {"learning_rate": 9.0}), tmp_path / "grid", [1.0])
    with pytest.raises(RecipeError, match="a sweep of another recipe"):
        sweep(make_recipe_with(recipe, method="prefix_tuning"), tmp_path / "grid", [1.0], [2])
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "h '))
    with pytest.raises(RecipeError, match="a sweep of another recipe, of other rows"):
        sweep(recipe, tmp_path / "grid", [1.0], [2])
    (tmp_path / "grid" / "results.json").write_text("[")
    with pytest.raises(RecipeError, match="holds no results of a sweep"):
        sweep(recipe, tmp_path / "grid", [1.0], [2])


def make_recipe_with(recipe: Recipe, **changes: Any) -> Recipe:
    from dataclasses import replace

    return replace(recipe, **changes)


def test_what_a_grid_may_hold(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_train", lambda chosen, rows: ({"accuracy": 0.5}, {}))
    for rates, lengths in (([0.0], [2]), ([float("nan")], [2]), ([1.0], [0])):
        with pytest.raises(RecipeError, match="expected learning rates above 0"):
            sweep(recipe, tmp_path / "grid", rates, lengths)
    with pytest.raises(RecipeError, match="the grid has the seed -1; expected whole numbers from 0"):
        sweep(recipe, tmp_path / "grid", [1.0], [2], [0, -1])
    bitfit = make_recipe_with(recipe, method="bitfit", options={})
    with pytest.raises(RecipeError, match="no lengths to try"):
        sweep(bitfit, tmp_path / "grid", [1.0], [2])
    assert sweep(bitfit, tmp_path / "bitfit", [1.0]).table().splitlines()[1].split() == ["none", "0.500*"]
    silent = make_recipe_with(recipe, training={k: v for k, v in recipe.training.items() if k != "learning_rate"})
    usual = defaults_of(recipe.method).training["learning_rate"]
    rates = sweep(silent, tmp_path / "silent").rates
    assert usual in rates and rates == pytest.approx([usual / 10, usual * 0.3, usual, usual * 3], rel=0.2)
    decoder = write_base(tmp_path / "decoder", "llama", "SEQ_CLS")
    heads = make_recipe_with(silent, base=str(decoder), method="p_tuning_v2")
    assert sweep(heads, tmp_path / "heads").rates == [2e-3, 6e-3, 2e-2, 6e-2]
    monkeypatch.setattr(module, "wrap_base", None)  # a finished sweep loads nothing
    assert sweep(heads, tmp_path / "heads").rates == [2e-3, 6e-3, 2e-2, 6e-2]
    named = make_recipe_with(heads, training=heads.training | {"learning_rate": 1e-3})
    assert sweep(named, tmp_path / "heads").rates == [1e-4, 3e-4, 1e-3, 3e-3]
    between = make_recipe_with(heads, training=heads.training | {"learning_rate": 2.4e-2})
    assert sweep(between, tmp_path / "heads").rates == [2e-3, 7e-3, 2.4e-2, 7e-2]
    assert sweep(heads, tmp_path / "heads").rates == [2e-3, 6e-3, 2e-2, 6e-2]


def test_seed_is_not_seeds(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(module, "_train", lambda chosen, rows: (seen.append(chosen.seed), ({"accuracy": 0.5}, {}))[1])
    command = ["sweep", str(tmp_path / "recipe.yaml"), "--seed=7", "--learning-rates", "1e-2", "--lengths", "2"]
    assert main(command) == 0 and seen == [7]
    assert "--seed=7" in (tmp_path / "out-sweep" / "results.md").read_text()


def test_tables() -> None:
    found = trials((1e-3, 4, 0, 0.5), (1e-3, 4, 1, 0.7), (1e-3, 8, 0, 0.9), (1e-3, 8, 1, None), (1e-2, 4, 0, 0.6))
    found.trials.append(Trial(1e-2, 4, 1, {"accuracy": 0.6}, learning={"flat": "step 9 of 10: it is flat"}))
    lines = found.table().splitlines()
    assert lines[0].split() == ["tokens", "0.001", "0.01"]
    assert lines[1].split("  ")[-2:] == ["0.600 ± 0.141*", "0.600 ± 0.000!"] and lines[2].split()[1:] == ["failed"] * 2
    markdown = found.table(markdown=True).splitlines()
    assert markdown[1].startswith("| -----: |") and all(line.count("|") == 4 for line in markdown)
    assert found.best_command() == "hf-ptune train r.yaml --training.learning_rate=0.001 --options.num_virtual_tokens=4"
    assert found.notes() == [
        "learning rate 0.001, 8 tokens, seed 1: failed: broke",
        "learning rate 0.01, 4 tokens, seed 1: step 9 of 10: it is flat",
    ]
    assert trials((1e-3, 4, 0, None)).best() is None
    assert "no run" in trials((1e-3, 4, 0, None)).best_command()


@pytest.mark.parametrize("rate", [0.0123456789, 1.23456789e-05, 1])
def test_the_best_command_names_the_rate_that_was_measured(rate: float, recipe: Recipe, tmp_path: Path) -> None:
    override = replace(trials((rate, 4, 0, 0.5)), command="").best_command().split()[0]
    assert read_recipe(tmp_path / "recipe.yaml", [override]).training["learning_rate"] == rate


def test_no_plot_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    found = trials((1e-3, 4, 0, 0.5))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_table(found, tmp_path, [3])
    assert "sweep.png" not in (tmp_path / "results.md").read_text()
    assert 'no plot: pip install "hf_ptune[plots]"' in report(found, tmp_path)


def test_a_grid_of_which_nothing_succeeds_is_a_failure(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_train", lambda *_: (_ for _ in ()).throw(RuntimeError("broke")))
    assert main(["sweep", str(tmp_path / "recipe.yaml"), "--learning-rates", "1e-2", "--lengths", "2"]) == 2
    said = capsys.readouterr()
    assert "failed" in said.out and "no run of the grid succeeded" in said.err


@pytest.fixture
def several(recipe: Recipe, tmp_path: Path) -> Path:
    """A recipe of two tasks, and of one of them as a variant."""
    path = tmp_path / "recipe.yaml"
    content = json.loads(path.read_text())
    alone = {name: content.pop(name) for name in ("task", "data")}
    rows = "\n".join(json.dumps(ROWS["TOKEN_CLS"](n)) for n in range(24))
    (tmp_path / "letters.jsonl").write_text(rows)
    sources = ("source", "eval_source", "test_source")
    letters = {"name": "letters", "task": "TOKEN_CLS", "data": dict.fromkeys(sources, "letters.jsonl")}
    alone["data"] |= dict.fromkeys(sources, alone["data"]["source"])
    content |= {"tasks": [{"name": "when", **alone}, letters], "variants": {"when": {"tasks": None, **alone}}}
    path.write_text(json.dumps(content))
    return path


def test_several_tasks_are_swept_by_their_mean(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And measured as the same run of the several tasks measures its held-out rows."""
    command = ["sweep", str(several), "--learning-rates", "1e-3", "5e-2", "--lengths", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out-sweep" / "results.json").read_text())["trials"]
    assert [t["error"] for t in found] == [None, None]
    one = found[1]["metrics"]
    assert one["mean"] == pytest.approx((one["when_accuracy"] + one["letters_f1"]) / 2)
    cells = [f"{m['mean']:.3f}({m['when_accuracy']:.3f},{m['letters_f1']:.3f})" for m in (t["metrics"] for t in found)]
    table = "".join(printed[2].split()).replace("*", "").replace("!", "")
    assert table == "2" + "".join(cells)
    title = "mean (when_accuracy, letters_f1)"
    assert printed[0] == f"validation {title}; learning rates across, virtual tokens down"
    assert f"{title} of 40 + 24 validation rows" in (tmp_path / "out-sweep" / "results.md").read_text()
    best = max((t["metrics"] for t in found), key=lambda metrics: metrics["mean"])
    assert main(printed[-1].removeprefix("best: hf-ptune ").split()) == 0
    for name in ("when", "letters"):
        measured = RunFacts.load(tmp_path / "out" / "adapter" / name).metrics[0]
        assert {k: best[f"{name}_{k}"] for k in measured if not k.startswith("test_")}.items() <= measured.items()
    several.write_text(several.read_text().replace('"tasks": [', '"temperature": 2, "tasks": [', 1))
    assert main(command) == 2 and "a sweep of another recipe" in capsys.readouterr().err


def test_rates_of_several_tasks_are_those_of_their_run(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which asks no task whether its rows are pairs of texts."""
    content = json.loads(several.read_text()) | {"method": "p_tuning_v2"}
    del content["variants"], content["training"]["learning_rate"]
    path, rows = tmp_path / "rows.jsonl", (tmp_path / "rows.jsonl").read_text()
    path.write_text(rows.replace('"label"', '"text_pair": "b", "label"'))
    monkeypatch.setattr(module, "_train", lambda *_: ({"mean": 0.5, "when_accuracy": 0.4, "letters_f1": 0.6}, {}))
    found = sweep(make_multitask_recipe(content, folder=tmp_path), tmp_path / "grid")
    assert found.rates[2] == defaults_of("p_tuning_v2", "SEQ_CLS").training["learning_rate"]
    assert found.rates[2] != defaults_of("p_tuning_v2", "SEQ_CLS", pairs=True).training["learning_rate"]
    assert "0.500* (0.400, 0.600)" in found.table()


def test_one_of_several_tasks_is_swept_by_a_variant(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(several), "--variant=when", "--learning-rates", "1e-2", "--lengths", "2"]) == 0
    best = capsys.readouterr().out.splitlines()[-1]
    assert main(best.removeprefix("best: hf-ptune ").split()) == 0
    assert (tmp_path / "out" / "adapter" / "config.json").is_file()


def test_a_template_has_its_own_length(tmp_path: Path) -> None:
    options = {"template": "[P3] {text} [MASK]", "verbalizer": {"early": "a", "late": "b"}}
    content = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    content |= {"task": "CLOZE_MASKED_LM", "task_options": options, "method": "prompt_tuning", "options": {}}
    recipe = make_recipe(content, folder=tmp_path)
    assert module._lengths(recipe, []) == module._lengths(recipe, [3]) == [3]
    with pytest.raises(RecipeError, match="the template places 3 virtual tokens"):
        module._lengths(recipe, [3, 5])


def test_heads_keep_their_own_rate(recipe: Recipe) -> None:
    silent = replace(recipe, method="prefix_tuning", training={})
    assert silent.rates() == (None, 2e-2)
    assert replace(silent, training={"learning_rate": 1e-4}).rates() == (None, None)
    assert replace(silent, task="CAUSAL_LM").rates() == (None, None)


def test_the_best_command_says_the_head_s_rate(recipe: Recipe, tmp_path: Path) -> None:
    training = {k: v for k, v in recipe.training.items() if k != "learning_rate"} | {"max_steps": 1}
    found = sweep(replace(recipe, method="prefix_tuning", training=training), tmp_path / "grid", [1e-2], [2], [0])
    assert "--head_learning_rate=0.02 --training.learning_rate=0.01" in found.best_command()


def test_runs_with_another_rate_of_the_head_are_not_mixed_in(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_train", lambda one, rows: ({"accuracy": 0.5}, {}))
    training = {k: v for k, v in recipe.training.items() if k != "learning_rate"}
    silent, folder = replace(recipe, method="prefix_tuning", training=training), tmp_path / "grid"
    named = replace(silent, training=training | {"learning_rate": 1e-2})
    sweep(silent, folder, [1e-2], [2], [0])
    with pytest.raises(RecipeError, match="or with another head_learning_rate"):
        sweep(named, folder, [1e-2], [2], [0])
    results = folder / "results.json"
    earlier = json.loads(results.read_text())
    assert earlier.pop("head_learning_rate") == 2e-2
    results.write_text(json.dumps(earlier))  # as earlier versions wrote it
    assert len(sweep(silent, folder, [1e-2, 2e-2], [2], [0]).trials) == 2
