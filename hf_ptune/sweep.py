"""A small grid of prompt length and learning rate, measured on validation rows."""

import gc
import json
import math
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, set_seed

from hf_ptune.adapter_file import digest_of, staged
from hf_ptune.arguments import make_arguments
from hf_ptune.callbacks import LearningCallback, MemoryCallback, ModelCardCallback
from hf_ptune.data import Rows, load_rows, split_rows
from hf_ptune.errors import RecipeError, naming, shorten
from hf_ptune.fresh_base import load_tokenizer
from hf_ptune.interruption import HeldInterruptions
from hf_ptune.methods import get_method
from hf_ptune.recipe import Recipe
from hf_ptune.templates import Template
from hf_ptune.train import evaluate, has_pairs, make_trainer, wrap_base

RESULTS_NAME, TABLE_NAME, PLOT_NAME = "results.json", "results.md", "sweep.png"
_STARTED = "the process ended during this run"
# of a run's own choosing: a trial leaves nothing and is seen by nobody
_TRIAL: dict[str, Any] = {"push_to_hub": False, "report_to": "none"}
_LAST: dict[str, Any] = {"save_strategy": "no", "load_best_model_at_end": False}
_BEST: dict[str, Any] = {"save_only_model": True, "save_total_limit": 1}  # in a folder that ends with the trial


@dataclass(frozen=True)
class Trial:
    """Hold one run of the grid.

    Args:
        learning_rate: peak learning rate.
        num_virtual_tokens: P; `None` for a method without a prompt.
        seed: of prompt, head and training.
        metrics: of the validation rows; empty where it failed.
        seconds: training and evaluation.
        learning: what `LearningCallback` found.
        error: why it failed.
    """

    learning_rate: float
    num_virtual_tokens: int | None
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    learning: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def place(self) -> tuple[float, int | None, int]:
        """Where in the grid."""
        return self.learning_rate, self.num_virtual_tokens, self.seed


@dataclass(frozen=True)
class Sweep:
    """Hold what a grid gave.

    Args:
        trials: all runs, failed ones too, in order of the grid.
        metric: the metric that chooses; greater is better.
        command: the command line of the recipe without the chosen values.
    """

    trials: list[Trial]
    metric: str
    command: str

    def mean(self, rate: float, length: int | None) -> tuple[float, float | None]:
        """Mean and sample deviation over seeds; NaN where one of them failed, no deviation of one seed."""
        cell = [t for t in self.trials if t.place[:2] == (rate, length)]
        values = [t.metrics[self.metric] for t in cell if t.error is None]
        if not cell or len(values) < len(cell):
            return math.nan, None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def rates(self) -> list[float]:
        return sorted({t.learning_rate for t in self.trials})

    @property
    def lengths(self) -> list[int | None]:
        return sorted({t.num_virtual_tokens for t in self.trials}, key=lambda n: n or 0)

    def best(self) -> tuple[float, int | None] | None:
        """Learning rate and length of the greatest mean; the shorter prompt, then the lower rate, of equals."""
        cells = [(self.mean(r, n)[0], n, r) for n, r in product(self.lengths, self.rates)]
        whole = [c for c in cells if math.isfinite(c[0])]
        if not whole:
            return None
        _, length, rate = max(whole, key=lambda c: (c[0], -(c[1] or 0), -c[2]))
        return rate, length

    def best_command(self) -> str:
        """The command line that trains with the best of the grid."""
        best = self.best()
        if best is None:
            return "no run of the grid succeeded"
        length = "" if best[1] is None else f" --options.num_virtual_tokens={best[1]}"
        return f"{self.command} --training.learning_rate={float(best[0])!r}{length}"

    def table(self, markdown: bool = False) -> str:
        """Lengths down, learning rates across; `*` marks the best, `!` what the watch on learning warned of."""
        head = ["tokens", *(f"{rate:g}" for rate in self.rates)]
        lines = [head] + [
            ["none" if n is None else str(n), *(self._cell(r, n) for r in self.rates)] for n in self.lengths
        ]
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        rows = [[cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
        if not markdown:
            return "\n".join("  ".join(row) for row in rows)
        rule = "| " + " | ".join("-" * (w - 1) + ":" for w in widths) + " |"
        text = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([text[0], rule, *text[1:]])

    def _cell(self, rate: float, length: int | None) -> str:
        mean, deviation = self.mean(rate, length)
        if math.isnan(mean):
            return "failed"
        spread = "" if deviation is None else f" ± {deviation:.3f}"
        warned = any(t.learning for t in self.trials if t.place[:2] == (rate, length))
        return f"{mean:.3f}{spread}{'!' if warned else ''}{'*' if (rate, length) == self.best() else ''}"

    def notes(self) -> list[str]:
        """Failures and warnings, one line each."""
        lines = []
        for trial in self.trials:
            where = f"learning rate {trial.learning_rate:g}, {trial.num_virtual_tokens} tokens, seed {trial.seed}"
            lines += [f"{where}: failed: {trial.error}"] if trial.error else []
            lines += [f"{where}: {message}" for message in trial.learning.values()]
        return lines


def sweep(
    recipe: Recipe,
    folder: Path,
    rates: Sequence[float] = (),
    lengths: Sequence[int] = (),
    seeds: Sequence[int] = (),
    *,
    command: str = "hf-ptune train RECIPE",
    retry: bool = False,
) -> Sweep:
    """Run a grid of prompt length and learning rate, and write results, table and plot.

    A run is measured on the recipe's held-out rows where the recipe has test rows besides, which stay unread; else on
    a part of the training rows, so that the held-out rows still tell what the chosen setting is worth.

    Args:
        recipe: what is run, with another learning rate, length and seed each time.
        folder: takes `results.json`, from which an interrupted sweep goes on, `results.md` and `sweep.png`.
        rates: peak learning rates; when unset that of the recipe's `training.learning_rate`, or of the method where it
            names none, and about a tenth, a third and three times as much, each of one digit.
        lengths: numbers of virtual tokens; the recipe's when unset.
        seeds: the recipe's own when unset.
        command: the recipe's command line, for the last line of the table.
        retry: whether runs that failed before are run again.

    Returns:
        All runs; a failed one stays among them.

    Raises:
        RecipeError: the folder holds another sweep, a value of the grid is out of range, or this is one of several
            processes, which would train runs of different values together.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise RecipeError(
            f"this is one of {processes} processes (WORLD_SIZE), and a sweep runs in one; start hf-ptune sweep without "
            "torchrun or accelerate launch."
        )
    task, rows = recipe.build_task(), _choose_rows(recipe, load_rows(recipe))
    tokens, head = _lengths(recipe, lengths), recipe.rates()[1]
    # the head's rate may be a default, which a learning rate that is named ends
    shared = {"recipe": _fingerprint(recipe, rows), "head_learning_rate": head}
    shared["best_checkpoint"] = bool(recipe.training.get("load_best_model_at_end"))
    known, usual = _read(folder, shared)
    if not rates:
        named = recipe.training.get("learning_rate")
        if named is None:
            usual = usual or _usual_rate(recipe, rows)
        rates = _around(named or usual)
    grid = _grid(rates, tokens, seeds or [recipe.seed])
    done: list[Trial] = []
    with tqdm(total=len(grid), desc="sweep", unit="run") as bar:
        for place in grid:
            trial = known.get(place)
            if trial is None or (retry and trial.error):
                with HeldInterruptions() as interruptions:
                    # told beforehand, so that a run that kills the process is not run for ever
                    _write(folder, shared, {**known, place: Trial(*place, error=_STARTED)}, usual)
                    try:
                        with interruptions.let_through():
                            trial = _run(recipe, rows, place)
                    except KeyboardInterrupt:
                        _write(folder, shared, known, usual)
                        raise
                    known[place] = trial
                    _write(folder, shared, known, usual)
            done.append(trial)
            bar.update()
            said = trial.metrics.get(task.metric)
            bar.set_postfix_str(f"{place[0]:g}, {place[1]} tokens: " + ("failed" if said is None else f"{said:.3f}"))
    if head is not None and recipe.head_learning_rate is None:
        command += f" --head_learning_rate={head!r}"
    found = Sweep(done, task.metric, command)
    _write_table(found, folder, len(rows.held_out))
    return found


def _usual_rate(recipe: Recipe, rows: Rows) -> float:
    """The method's learning rate for the recipe's base, which has to be loaded for that."""
    tokenizer = load_tokenizer(recipe.base, recipe.base_options.get("revision"))
    causal = wrap_base(recipe, rows, tokenizer).config.over_decoder
    gc.collect()  # before the first run loads it again
    own = recipe.defaults(has_pairs(recipe.build_task(), rows), causal)
    return float(own.training.get("learning_rate", 1e-2))


def _around(rate: float) -> list[float]:
    tenth, third, triple = (float(f"{rate * factor:.1g}") for factor in (0.1, 0.3, 3))
    return [tenth, third, rate, triple]


def _lengths(recipe: Recipe, lengths: Sequence[int]) -> list[int | None]:
    options = recipe.defaults().options | recipe.options
    tokens: list[int | None] = list(lengths) or [options.get("num_virtual_tokens", 20)]
    template = recipe.build_task().config_options().get("template")
    if template and (placed := Template.parse(template).num_virtual_tokens):
        if set(lengths) - {placed}:
            raise RecipeError(
                f"the template places {placed} virtual tokens, so that there are no other lengths to try."
            )
        return [placed]
    if get_method(recipe.method).kind is None:
        if lengths:
            raise RecipeError(f"{recipe.method} has no virtual tokens, so that there are no lengths to try.")
        return [None]
    return tokens


def _grid(
    rates: Sequence[float], tokens: Sequence[int | None], seeds: Sequence[int]
) -> list[tuple[float, int | None, int]]:
    if wrong := [r for r in rates if not (math.isfinite(r) and r > 0)] + [n for n in tokens if n is not None and n < 1]:
        raise RecipeError(f"the grid has {wrong[0]}; expected learning rates above 0 and lengths of at least 1.")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise RecipeError(f"the grid has the seed {wrong[0]}; expected whole numbers from 0 to {2**32 - 1}.")
    return list(product(dict.fromkeys(rates), dict.fromkeys(tokens), dict.fromkeys(seeds)))


def _choose_rows(recipe: Recipe, rows: Rows) -> Rows:
    """Rows to train on and to choose by; test rows stay out, and held-out ones where they are the last word."""
    if rows.test:
        return Rows(rows.train, rows.held_out, rows.labels)
    data = recipe.data
    train, validation = split_rows(rows.train, data.eval_fraction, data.split_seed + 1, recipe.build_task().group_role)
    return Rows(train, validation, rows.labels)


def _run(recipe: Recipe, rows: Rows, place: tuple[float, int | None, int]) -> Trial:
    rate, length, seed = place
    options = recipe.options | ({} if length is None else {"num_virtual_tokens": length})
    kept = _BEST if recipe.training.get("load_best_model_at_end") else _LAST
    training = recipe.training | _TRIAL | kept | {"learning_rate": rate}
    chosen = replace(recipe, options=options, training=training, seed=seed, head_learning_rate=recipe.rates()[1])
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as nobody_s:
            metrics, learning = _train(replace(chosen, output_dir=nobody_s), rows)
        return Trial(*place, metrics, time.perf_counter() - started, learning)
    except Exception as error:  # whatever stops one run, the others go on
        seconds = time.perf_counter() - started
        return Trial(*place, seconds=seconds, error=shorten(f"{type(error).__name__}: {error}"))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(recipe: Recipe, rows: Rows) -> tuple[dict[str, float], dict[str, str]]:
    arguments = make_arguments(recipe)
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.base, recipe.base_options.get("revision"))
    trainer = make_trainer(recipe, arguments, wrap_base(recipe, rows, tokenizer), tokenizer, rows)
    for callback in (PrinterCallback, ProgressCallback, MemoryCallback, ModelCardCallback):
        trainer.remove_callback(callback)
    trainer.train()
    metrics = evaluate(trainer)
    watch = next((c for c in trainer.callback_handler.callbacks if isinstance(c, LearningCallback)), None)
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise FloatingPointError(f"the validation loss is {metrics['loss']}; lower the learning rate.")
    return metrics, {} if watch is None else dict(watch.found)


def _fingerprint(recipe: Recipe, rows: Rows) -> str:
    """What all runs of one sweep share."""
    content = {k: v for k, v in asdict(recipe).items() if v is not None}
    for section, name in (("training", "learning_rate"), ("options", "num_virtual_tokens")):
        content[section].pop(name, None)
    for name in ("seed", "output_dir", "card", "folder"):
        content.pop(name, None)
    content["rows"] = asdict(rows)  # whose files may have been changed since
    return digest_of(json.loads(json.dumps(content, default=str)))


def _read(folder: Path, shared: dict[str, Any]) -> tuple[dict[tuple[float, int | None, int], Trial], float]:
    """Trials of an earlier call, and the method's learning rate for the base; 0 where it was not asked for."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {}, 0.0
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial(**t) for t in content["trials"]]
        earlier = {"head_learning_rate": shared["head_learning_rate"], "best_checkpoint": False}  # not told at first
        same = all((earlier | content)[name] == value for name, value in shared.items())
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} holds no results of a sweep ({shorten(error)}); name another folder.") from error
    if not same:
        raise RecipeError(
            f"{path} holds a sweep of another recipe, of other rows, or with another head_learning_rate, whose default "
            "is for recipes without training.learning_rate; name another folder, or remove the file."
        )
    return {t.place: t for t in trials}, content.get("usual_rate", 0.0)


def _write(folder: Path, shared: dict[str, Any], trials: dict[Any, Trial], usual: float) -> None:
    content = shared | {"usual_rate": usual, "trials": [asdict(t) for t in trials.values()]}
    with staged(folder) as aside, naming(aside / RESULTS_NAME):
        (aside / RESULTS_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_table(found: Sweep, folder: Path, count: int) -> None:
    with staged(folder) as aside:
        with naming(aside / PLOT_NAME):
            plot = draw(found, aside / PLOT_NAME)
        lines = [f"{found.metric} of {count} validation rows; learning rates across, virtual tokens down", ""]
        lines += [found.table(markdown=True), "", f"Best: `{found.best_command()}`"]
        lines += ["", *(f"- {note}" for note in found.notes())] if found.notes() else []
        lines += ["", f"![{found.metric} over learning rates]({PLOT_NAME})"] if plot else []
        with naming(aside / TABLE_NAME):
            (aside / TABLE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(found: Sweep, path: Path) -> bool:
    """Draw the metric over learning rates, a line for each length.

    Returns:
        Whether it could: matplotlib is installed, and some run succeeded.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if found.best() is None:
        return False
    figure = Figure(figsize=(5, 3.4))
    axes = figure.subplots()
    for length in found.lengths:
        cells = [(rate, *found.mean(rate, length)) for rate in found.rates]
        whole = [(rate, mean, deviation or 0.0) for rate, mean, deviation in cells if math.isfinite(mean)]
        if whole:
            label = "no virtual tokens" if length is None else f"{length} tokens"
            x, y, spread = zip(*whole, strict=True)
            axes.errorbar(x, y, yerr=spread if any(spread) else None, marker="o", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"validation {found.metric}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return True


def report(found: Sweep, folder: Path) -> str:
    """What to print when a sweep has ended."""
    lines = [f"validation {found.metric}; learning rates across, virtual tokens down", found.table(), *found.notes()]
    where = f"written: {folder / RESULTS_NAME}, {folder / TABLE_NAME}"
    if (folder / PLOT_NAME).is_file():
        where += f", {folder / PLOT_NAME}"
    elif found.best() is not None:
        where += '; no plot: pip install "hf_ptune[plots]", and run the sweep again (nothing is trained anew)'
    return "\n".join([*lines, where, f"best: {found.best_command()}"])


def command_of(recipe: str, overrides: Sequence[str]) -> str:
    """The command line that trains by a recipe."""
    return shlex.join(["hf-ptune", "train", recipe, *overrides])
