"""A small grid of prompt length and learning rate, measured on validation rows."""

import gc
import json
import math
import os
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
from hf_ptune.sweep_table import RESULTS_NAME, Sweep, Trial, write_table
from hf_ptune.templates import Template
from hf_ptune.train import evaluate, has_pairs, make_trainer, wrap_base
from hf_ptune.train_multitask import MultiTaskRecipe, build, make_multitask_trainer

AnyRecipe = Recipe | MultiTaskRecipe
_STARTED = "the process ended during this run"
# of a run's own choosing: a trial leaves nothing and is seen by nobody
_TRIAL: dict[str, Any] = {"push_to_hub": False, "report_to": "none"}
_LAST: dict[str, Any] = {"save_strategy": "no", "load_best_model_at_end": False}
_BEST: dict[str, Any] = {"save_only_model": True, "save_total_limit": 1}  # in a folder that ends with the trial


def sweep(
    recipe: AnyRecipe,
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
    a part of the training rows, so that the held-out rows still tell what the chosen setting is worth. Of several
    tasks the mean of their main metrics chooses, each from 0 to 1.

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
    tasks = _tasks(recipe)
    rows = {name: _choose_rows(one, load_rows(one)) for name, one in tasks.items()}
    metric, *beside = _metrics(tasks)
    one = shared_of(recipe)
    tokens, head = _lengths(one, lengths), one.rates()[1]
    # the head's rate may be a default, which a learning rate that is named ends
    shared = {"recipe": _fingerprint(recipe, rows), "head_learning_rate": head}
    shared["best_checkpoint"] = bool(one.training.get("load_best_model_at_end"))
    known, usual = _read(folder, shared)
    if not rates:
        named = one.training.get("learning_rate")
        if named is None:
            usual = usual or _usual_rate(tasks, rows)
        rates = _around(named or usual)
    grid = _grid(rates, tokens, seeds or [one.seed])
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
            said = trial.metrics.get(metric)
            bar.set_postfix_str(f"{place[0]:g}, {place[1]} tokens: " + ("failed" if said is None else f"{said:.3f}"))
    if head is not None and one.head_learning_rate is None:
        command += f" --head_learning_rate={head!r}"
    found = Sweep(done, metric, command, beside)
    write_table(found, folder, [len(part.held_out) for part in rows.values()])
    return found


def shared_of(recipe: AnyRecipe) -> Recipe:
    """A recipe itself, or of several tasks what they share."""
    return recipe.shared if isinstance(recipe, MultiTaskRecipe) else recipe


def _tasks(recipe: AnyRecipe) -> dict[str, Recipe]:
    """Recipes by the name of their task; that of a single one is ""."""
    return recipe.tasks if isinstance(recipe, MultiTaskRecipe) else {"": recipe}


def _metrics(tasks: Mapping[str, Recipe]) -> list[str]:
    """The metric that chooses; of several tasks the mean, and each one's own."""
    if "" in tasks:
        return [tasks[""].build_task().metric]
    return ["mean", *(f"{name}_{one.build_task().metric}" for name, one in tasks.items())]


def _usual_rate(tasks: Mapping[str, Recipe], rows: Mapping[str, Rows]) -> float:
    """The method's learning rate for the recipe's base, which has to be loaded for that."""
    name, one = next(iter(tasks.items()))
    tokenizer = load_tokenizer(one.base, one.base_options.get("revision"))
    causal = wrap_base(one, rows[name], tokenizer).config.over_decoder
    gc.collect()  # before the first run loads it again
    own = one.defaults(not name and has_pairs(one.build_task(), rows[name]), causal)
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


def _run(recipe: AnyRecipe, rows: Mapping[str, Rows], place: tuple[float, int | None, int]) -> Trial:
    rate, length, seed = place
    one = shared_of(recipe)
    kept = _BEST if one.training.get("load_best_model_at_end") else _LAST
    changes: dict[str, Any] = {
        "options": one.options | ({} if length is None else {"num_virtual_tokens": length}),
        "training": one.training | _TRIAL | kept | {"learning_rate": rate},
        "seed": seed,
        "head_learning_rate": one.rates()[1],
    }
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as nobody_s:
            changes["output_dir"] = nobody_s
            if isinstance(recipe, MultiTaskRecipe):
                changes = {"tasks": {name: replace(task, **changes) for name, task in recipe.tasks.items()}}
            metrics, learning = _train(replace(recipe, **changes), rows)
        return Trial(*place, metrics, time.perf_counter() - started, learning)
    except Exception as error:  # whatever stops one run, the others go on
        seconds = time.perf_counter() - started
        return Trial(*place, seconds=seconds, error=shorten(f"{type(error).__name__}: {error}"))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(recipe: AnyRecipe, rows: Mapping[str, Rows]) -> tuple[dict[str, float], dict[str, str]]:
    one = shared_of(recipe)
    arguments = make_arguments(one)
    set_seed(one.seed)
    tokenizer = load_tokenizer(one.base, one.base_options.get("revision"))
    trainer: Any
    if isinstance(recipe, MultiTaskRecipe):
        trainer = make_multitask_trainer(recipe, arguments, *build(recipe, tokenizer, rows), tokenizer)
    else:
        trainer = make_trainer(one, arguments, wrap_base(one, rows[""], tokenizer), tokenizer, rows[""])
    for callback in (PrinterCallback, ProgressCallback, MemoryCallback, ModelCardCallback):
        trainer.remove_callback(callback)
    trainer.train()
    metrics = evaluate(trainer)
    watch = next((c for c in trainer.callback_handler.callbacks if isinstance(c, LearningCallback)), None)
    if lost := [v for k, v in metrics.items() if k.endswith("loss") and not math.isfinite(v)]:
        raise FloatingPointError(f"the validation loss is {lost[0]}; lower the learning rate.")
    return metrics, {} if watch is None else dict(watch.found)


def _fingerprint(recipe: AnyRecipe, rows: Mapping[str, Rows]) -> str:
    """What all runs of one sweep share."""
    digests = {name: _digest(one, rows[name]) for name, one in _tasks(recipe).items()}
    if isinstance(recipe, MultiTaskRecipe):
        return digest_of({"tasks": digests, "temperature": recipe.temperature})
    return digests[""]


def _digest(recipe: Recipe, rows: Rows) -> str:
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


def command_of(recipe: str, overrides: Sequence[str]) -> str:
    """The command line that trains by a recipe."""
    return shlex.join(["hf-ptune", "train", recipe, *overrides])
