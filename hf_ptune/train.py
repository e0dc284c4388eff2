"""The walk: a recipe becomes an adapter folder, and the folder answers questions.

Launch: `accelerate launch -m hf_ptune.train recipes/quickstart.yaml [--section.key=value …]`
"""

import argparse
import atexit
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_ptune.adapter_file import ADAPTER_FOLDER, WEIGHTS_NAME
from hf_ptune.arguments import check_batches, make_arguments, settle_arguments
from hf_ptune.backbone import TASKS, anchored
from hf_ptune.callbacks import (
    BestMetricCallback,
    DecayCallback,
    EarlyStoppingCallback,
    FreezeBackboneCallback,
    GuardCallback,
    LearningCallback,
    MemoryCallback,
    ModelCardCallback,
)
from hf_ptune.callbacks.model_card import gather_facts
from hf_ptune.cards import TIMES
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.console import let_print
from hf_ptune.data import Rows, load_rows
from hf_ptune.endings import closing_ids, let_end
from hf_ptune.engines import last_checkpoint
from hf_ptune.errors import INTERRUPTED, TERMINATED, PTuneError, RecipeError, Terminated, from_system
from hf_ptune.fresh_base import check_direction, load_base, load_tokenizer
from hf_ptune.interruption import TerminationCallback, checkpoints_in, how_to_go_on, terminable, without_handler
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.optimizer import make_optimizer
from hf_ptune.option_checks import READINGS
from hf_ptune.overrides import split_overrides
from hf_ptune.publishing import finish_folder, save_tokenizer
from hf_ptune.recipe import Recipe, read_content, read_recipe
from hf_ptune.resuming import RunCallback, check_checkpoint
from hf_ptune.row_checks import check_features
from hf_ptune.sharding import loading_alone
from hf_ptune.sources import HUB
from hf_ptune.tasks import Answer, Feature, Row, Task, TaskTrainer
from hf_ptune.tasks.generation import GenerationTask
from hf_ptune.wrapping import get_ptune_model

logger = logging.get_logger(__name__)
_QUESTIONS = 3
_TRAINING_SPLITS = ("train", "training")


@dataclass(frozen=True)
class Outcome:
    """Hold what a run produced: metrics of the held-out rows before and after, folder, answers (first rank).

    `before` has none where a run went on with other held-out rows, or measured them in another way. `test` has the
    metrics of the test rows, where there are some.
    """

    before: dict[str, float]
    after: dict[str, float]
    folder: Path
    answers: list[Answer]
    test: dict[str, float] = field(default_factory=dict)


def run(recipe: Recipe) -> Outcome:
    """Train an adapter by a recipe, save it, load it again and ask it.

    Args:
        recipe: what `read_recipe` returns.

    Returns:
        Metrics before and after, the folder, and on the first rank the answers of the adapter that it holds.

    Raises:
        PTuneError: data, base, method or first batch do not fit.
    """
    arguments = make_arguments(recipe)  # what is wrong there is told before data are read
    set_seed(recipe.seed)
    task, rows = recipe.build_task(), load_rows(recipe)
    tokenizer = load_tokenizer(recipe.base, recipe.base_options.get("revision"))
    model = wrap_base(recipe, rows, tokenizer)
    arguments = settle_arguments(arguments, recipe, has_pairs(task, rows), model.config.over_decoder)
    trainer = make_trainer(recipe, arguments, model, tokenizer, rows)
    test_features = task.encode(rows.test, tokenizer, rows.labels, held_out=True) if rows.test else []
    if test_features:
        check_features(model, task, tokenizer, test_features, held_out=True)

    first = trainer.is_world_process_zero()
    if first:
        kept, out = count_rows(rows.train, trainer.train_dataset), count_rows(rows.held_out, trainer.eval_dataset)
        print(f"{kept} rows to train on, {out} held out, {len(rows.labels)} labels")
        model.print_trainable_parameters()
    # before the first step, but not before training: engines that split have none to evaluate with until then
    arguments.eval_on_start = True
    train_on(trainer, recipe)
    logs = trainer.state.log_history  # of a run that went on, what its checkpoint had logged too
    fresh = (e for e in logs if e.get("step") == 0 and any(k.startswith("eval_") for k in e))
    before = numbers(next(fresh, {}), "eval")
    after = evaluate(trainer)
    test = evaluate(trainer, test_features) if test_features else {}
    if arguments.push_to_hub:
        trainer.push_to_hub()

    folder = Path(recipe.output_dir) / ADAPTER_FOLDER
    answers: list[Answer] = []
    tensors = model.adapter_state_dict()  # where ranks hold parts, all of them come here
    if first:
        save_tokenizer(tokenizer, folder)
        facts = gather_facts(
            arguments, trainer.state, model, card_facts(recipe, rows, task, tokenizer, trainer.train_dataset)
        )
        finish_folder(model, folder, Path(recipe.output_dir).name, facts=facts, state_dict=tensors)
        answers = ask(folder, task, rows.held_out, recipe.seed, recipe.base_options)
        report(Outcome(before, after, folder, answers, test), task.metric)
    trainer.accelerator.wait_for_everyone()
    return Outcome(before, after, folder, answers, test)


def wrap_base(recipe: Recipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> PTunePreTrainedModel:
    """Load a recipe's base and wrap it; the method's defaults fill the options that the recipe leaves out.

    Raises:
        PTuneError: the base does not fit the task, or cannot take the method.
    """
    task = recipe.build_task()
    if isinstance(task, GenerationTask):
        let_end(tokenizer)
    config = make_config(recipe, task.config_options(), has_pairs(task, rows))
    base = load_base(recipe.base, task.model_task, rows.labels, tokenizer, config, recipe.base_options)
    model = get_ptune_model(base, config, tokenizer)
    check_direction(model, task)
    return model


def has_pairs(task: Task, rows: Rows) -> bool:
    """Whether rows have a second text beside the first one: all have it, or none."""
    return any(task.pair_role in row for row in rows.train[:1])


def make_config(recipe: Recipe, further: Mapping[str, Any] | None = None, pairs: bool = False) -> PTuneConfig:
    """The configuration of a recipe's adapter; the method's defaults fill the options that the recipe leaves out.

    Args:
        recipe: names base, method and options.
        further: options of its task, which come first.
        pairs: whether its rows have two texts.
    """
    usual = recipe.defaults(pairs).options
    if recipe.options.get("prompt_tuning_init") == "ADAPTER" and recipe.options.get("prompt_tuning_init_head"):
        usual = usual | dict.fromkeys(READINGS, "auto")  # a head that comes along reads what it did there
    options = usual | recipe.options | dict(further or {})
    named = {
        "base_model_name_or_path": anchored(recipe.base),
        "base_model_revision": recipe.base_options.get("revision"),
    }
    return PTuneConfig(method=recipe.method, **named, **options)


def count_rows(rows: Sequence[Row], features: Sequence[Feature]) -> int:
    """How many rows features were made of, the others being left out."""
    return min(len(rows), len(features))


def card_facts(
    recipe: Recipe, rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase, train: Sequence[Feature]
) -> dict[str, Any]:
    """What a recipe, its rows and the features of those to train on tell a card."""
    given = {k: v for k, v in asdict(recipe.card).items() if v is not None}
    given["datasets"] = data_names(recipe)
    own = (*recipe.rates(), recipe.learning_rate_decay)
    rates = zip(("backbone_learning_rate", "head_learning_rate", "learning_rate_decay"), own, strict=True)
    read = {"max_length": task.max_length, "training_rows": count_rows(rows.train, train)}
    given["hyperparameters"] = {name: rate for name, rate in rates if rate is not None} | read
    if not rows.held_out:
        return given
    given["limits"] = [*given.get("limits", []), *task.limits(rows.held_out[0])]
    example = task.example(rows.held_out[0], tokenizer)
    if example is None:
        return given
    # a chat template writes texts whole
    closes = task.model_task == "CAUSAL_LM" and isinstance(example, str)
    return given | {"example": example} | ({"closing": len(closing_ids(tokenizer))} if closes else {})


def data_names(recipe: Recipe) -> list[str]:
    """What data go by on a card: their id on the Hub, or a file's name, or its folder's where the file is a split."""
    source = recipe.data.source
    if recipe.card.datasets is not None:
        return recipe.card.datasets
    if source.startswith(HUB):
        return [source.removeprefix(HUB)]
    path = Path(os.path.abspath(recipe.folder / source))
    split = path.stem in _TRAINING_SPLITS and path.parent != Path(os.path.expanduser("~"))  # named by its user
    return [path.parent.name or path.stem if split else path.stem]


def train_on(trainer: Trainer, *recipes: Recipe) -> None:
    """Train, from the checkpoint that is named, or of `true` from the last one of the output folder.

    Args:
        trainer: with the arguments of a recipe.
        recipes: that one; of several tasks, that of each.

    Raises:
        RecipeError: the checkpoint is of a run with another adapter, on other rows, with another seed or optimizer,
            or with other learning rates; or `metric_for_best_model` names what is not measured.
        AdapterFileError: the checkpoint's config.json cannot be read.
        ConfigError: it describes no adapter.
        Terminated: SIGTERM has come, and with `enable_jit_checkpoint` a checkpoint has been written where a step was
            under way.
    """
    resume = trainer.args.resume_from_checkpoint
    checkpoint = last_checkpoint(str(trainer.args.output_dir)) if resume in (True, "true") else resume
    measured = repr([(recipe.task, sorted(recipe.task_options.items())) for recipe in recipes])
    run_facts = RunCallback(trainer, recipes[0].rates(), measured)
    if checkpoint:
        check_checkpoint(trainer.model, checkpoint)
        run_facts.check(checkpoint)
    elif trainer.is_world_process_zero() and (earlier := last_checkpoint(str(trainer.args.output_dir))):
        logger.warning(
            f"{earlier} is there from an earlier run, and this one starts anew; name another output_dir to keep both "
            "apart, or set training.resume_from_checkpoint: true to go on with that one."
        )
    trainer.add_callback(BestMetricCallback())
    trainer.add_callback(run_facts)
    terminated = TerminationCallback(trainer).watching() if trainer.args.enable_jit_checkpoint else nullcontext()
    try:
        with terminated:
            trainer.train(checkpoint)
    except ValueError as error:
        if checkpoint is None or "parameter group" not in str(error):
            raise
        raise RecipeError(
            f"{checkpoint} is of a run in which other parameters had learning rates of their own ({error}); give "
            "head_learning_rate and backbone_learning_rate as that run had them, or train anew."
        ) from error
    trainer.remove_callback(EarlyStoppingCallback)  # what is measured from here on ends nothing


def make_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: PTunePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
) -> TaskTrainer:
    """Put a Trainer around a model, watched by the callbacks.

    Raises:
        PTuneError: rows do not fit the model, or fill no batch.
    """
    task = recipe.build_task()
    scorer = task.scorer(tokenizer, rows.labels)
    train = task.encode(rows.train, tokenizer, rows.labels)
    held_out = task.encode(rows.held_out, tokenizer, rows.labels, held_out=True)
    check_features(model, task, tokenizer, train)
    check_features(model, task, tokenizer, held_out, held_out=True)
    with without_handler(arguments):
        trainer = TaskTrainer(
            task=task,
            labels=rows.labels,
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=make_optimizer(arguments, model, *recipe.rates()),
            callbacks=[
                FreezeBackboneCallback(),
                GuardCallback(None if scorer is None else scorer.loss),
                LearningCallback(
                    recipe.defaults(has_pairs(task, rows), model.config.over_decoder).training.get("learning_rate")
                ),
                MemoryCallback(),
                ModelCardCallback(**card_facts(recipe, rows, task, tokenizer, train)),
                *scheduling(recipe),
            ],
        )
    check_batches(trainer)
    return trainer


def scheduling(recipe: Recipe) -> list[TrainerCallback]:
    """What lets learning rates fall by epochs, or ends training early, where a recipe asks for it."""
    asked = ((DecayCallback, recipe.learning_rate_decay), (EarlyStoppingCallback, recipe.early_stopping_patience))
    return [callback(value) for callback, value in asked if value is not None]


def evaluate(trainer: TaskTrainer, test: list[Feature] | None = None) -> dict[str, float]:
    """Metrics of the held-out features, or of test features, by their plain names."""
    prefix = "eval" if test is None else "test"
    return numbers(trainer.evaluate(test, metric_key_prefix=prefix), prefix)


def numbers(log: dict[str, Any], prefix: str) -> dict[str, float]:
    """The measurements of an evaluation's log, by their plain names; how long it took is none."""
    start = f"{prefix}_"
    found = {k.removeprefix(start): v for k, v in log.items() if k.startswith(start) and isinstance(v, float)}
    return {k: v for k, v in found.items() if not k.endswith(TIMES)}


def load_adapter(source: str | Path, task: Task, base_options: Mapping[str, Any]) -> Any:
    """Load an adapter by its task's Auto class.

    Args:
        source: folder, or id on the Hub.
        task: what it was trained for.
        base_options: how its base is loaded; the revision stands in the adapter.

    Returns:
        The model, in eval mode.
    """
    options = {name: value for name, value in base_options.items() if name != "revision"}
    return TASKS[task.model_task].from_pretrained(source, **options).eval()


def ask(
    folder: Path, task: Task, rows: Sequence[Row], seed: int, base_options: Mapping[str, Any] | None = None
) -> list[Answer]:
    """Load a folder by its Auto class and let it answer a few rows.

    Args:
        folder: adapter and tokenizer.
        task: what it was trained for.
        rows: held-out ones.
        seed: by which rows are drawn, unlike ones where the task has groups.
        base_options: how its base is loaded; the revision stands in the folder.
    """
    with loading_alone():
        model = load_adapter(folder, task, base_options or {})
    drawn = random.Random(seed).sample(rows, len(rows))
    if task.group_role is not None:
        drawn = list({row[task.group_role]: row for row in drawn}.values())  # one of each group
    return task.ask(model, AutoTokenizer.from_pretrained(folder), drawn[:_QUESTIONS])


def report(outcome: Outcome, metric: str) -> None:
    """Print what a run produced."""
    size = (outcome.folder / WEIGHTS_NAME).stat().st_size
    before = f"{outcome.before[metric]:.3f} before, " if metric in outcome.before else ""
    lines = [
        f"held-out {metric}: {before}{outcome.after[metric]:.3f} after training",
        *([f"test {metric}: {outcome.test[metric]:.3f}"] if outcome.test else []),
        f"adapter: {outcome.folder} ({size / 1024:.0f} KiB of weights)",
        "reloaded from that folder:",
    ]
    lines += [f"  {a.question}\n    answer: {a.answer}    truth: {a.truth}" for a in outcome.answers]
    print("\n".join(lines), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe that the command line names.

    Args:
        arguments: the recipe's path, then overrides `--section.key=value`; those of the process when unset.

    Returns:
        The exit code: 0, 2 after an error that has been printed, 130 after an interruption, or 143 after SIGTERM.
    """
    return command(
        "hf_ptune.train", "Train an adapter by a recipe.", lambda *given: run(read_recipe(*given)), arguments
    )


@terminable()
def command(
    module: str, purpose: str, train: Callable[[str, list[str]], Any], arguments: Sequence[str] | None = None
) -> int:
    """Train by the recipe that a command line names, and print what errors say.

    Args:
        module: what is launched.
        purpose: what it does.
        train: takes the recipe's path and the overrides.
        arguments: see `main`.

    Returns:
        The exit code: 0, 2 after an error that has been printed, 130 after an interruption, or 143 after SIGTERM.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=purpose)
    parser.add_argument("recipe", type=os.path.expanduser, help="a YAML file")
    others, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    known, further = parser.parse_known_args(others)
    overrides = [*further, *overrides]
    let_print()
    folder, resume = "", None
    earlier: dict[str, int] = {}
    try:
        folder, resume = _goes_on(read_content(known.recipe, overrides))
        earlier = checkpoints_in(folder)
        train(known.recipe, overrides)
    except KeyboardInterrupt as interrupted:
        print(how_to_go_on(folder, resume, earlier), file=sys.stderr)
        return TERMINATED if isinstance(interrupted, Terminated) else INTERRUPTED
    except Exception as error:
        told = error if isinstance(error, PTuneError) else from_system(error, folder)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


def _goes_on(content: Mapping[str, Any]) -> tuple[str, Any]:
    """Where a recipe's run writes checkpoints, and which one it begins with."""
    training = content.get("training")
    resume = training.get("resume_from_checkpoint") if isinstance(training, dict) else None
    if isinstance(resume, str):
        resume = os.path.expanduser(resume)
    return os.path.expanduser(str(content.get("output_dir"))), resume


def leave(code: int) -> NoReturn:
    """End the process; of several processes, without the interpreter's end, in which threads of gloo may abort."""
    if dist.is_available() and dist.is_initialized():
        if code == 0:
            dist.barrier()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
