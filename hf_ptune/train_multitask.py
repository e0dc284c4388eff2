"""The walk of several tasks: one recipe becomes one prompt, and an adapter folder for each task.

Launch: `accelerate launch -m hf_ptune.train_multitask recipe.yaml [--section.key=value …]`
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import align_special_tokens

from hf_ptune.adapter_file import ADAPTER_FOLDER
from hf_ptune.arguments import check_batches, make_arguments, settle_arguments
from hf_ptune.callbacks import LearningCallback, MemoryCallback, check_batch
from hf_ptune.callbacks.learning import TASK_LOSS
from hf_ptune.callbacks.model_card import gather_facts
from hf_ptune.cards import public_name
from hf_ptune.data import Rows, load_rows
from hf_ptune.endings import let_end
from hf_ptune.engines import at_end, counting_steps
from hf_ptune.errors import RecipeError
from hf_ptune.fresh_base import check_direction, load_base, load_tokenizer
from hf_ptune.hub import push_folder
from hf_ptune.interruption import without_handler
from hf_ptune.multitask import (
    TASK_KEY,
    MultiTaskDataset,
    MultiTaskPrompt,
    TaskCollator,
    TaskSampler,
    get_multitask_model,
    share_base,
)
from hf_ptune.optimizer import make_optimizer
from hf_ptune.publishing import finish_folder, save_tokenizer
from hf_ptune.recipe import Recipe, make_recipe, read_content, read_recipe
from hf_ptune.row_checks import check_features
from hf_ptune.tasks import Feature, Task, TaskTrainer
from hf_ptune.tasks.generation import GenerationTask
from hf_ptune.train import (
    card_facts,
    command,
    data_names,
    evaluate,
    leave,
    make_config,
    scheduling,
    train_on,
)

_OWN = ("task", "data", "task_options", "card")  # what each task says by itself
_GUARDED_ROWS = 8
_SMOOTHED = ("SEQ_CLS", "TOKEN_CLS", "MULTIPLE_CHOICE", "MASKED_LM")  # labels stand where their logits do


@dataclass(frozen=True)
class MultiTaskRecipe:
    """Name several tasks over one base, with one prompt.

    Args:
        tasks: name to its recipe; all but data, task and card are the same in them.
        temperature: of `TaskSampler`.
    """

    tasks: dict[str, Recipe]
    temperature: float = 1.0

    @property
    def shared(self) -> Recipe:
        """Any of the recipes, for what they share."""
        return next(iter(self.tasks.values()))


@dataclass(frozen=True)
class Part:
    """Hold a task with its labels, its rows, and the features of those to train on, held out, and to test."""

    task: Task
    labels: list[str]
    rows: Rows
    train: list[Feature]
    held_out: list[Feature]
    test: list[Feature]


def make_multitask_recipe(
    content: Mapping[str, Any], where: str = "recipe", folder: Path = Path(".")
) -> MultiTaskRecipe:
    """Check the content of a recipe file with `tasks`.

    Args:
        content: what the YAML says: `tasks`, a list of `name`, `task`, `data` and where needed `task_options` and
            `card`; `temperature`; the keys of other recipes besides.
        where: the file's name, for messages.
        folder: where paths of data start.

    Raises:
        RecipeError: as of other recipes, and names that are missing or given twice.
    """
    shared = {k: v for k, v in content.items() if k not in ("tasks", "temperature")}
    given, temperature = content.get("tasks"), content.get("temperature", 1.0)
    if not isinstance(given, list) or not given or not all(isinstance(t, Mapping) for t in given):
        raise RecipeError(f"{where}: tasks holds no list of tasks; expected entries of name, {', '.join(_OWN)}.")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or temperature <= 0:
        raise RecipeError(f"{where}: temperature is {temperature!r}; expected a number above 0.")
    tasks: dict[str, Recipe] = {}
    for entry in given:
        name = entry.get("name")
        if not isinstance(name, str) or name in tasks:
            raise RecipeError(f"{where}: a task has the name {name!r}; expected one of its own for each.")
        if wrong := [k for k in entry if k not in ("name", *_OWN)]:
            raise RecipeError(f"{where}: unknown key {wrong[0]} of task {name}; expected name, {', '.join(_OWN)}.")
        own = {k: v for k, v in entry.items() if k != "name"}
        tasks[name] = make_recipe(shared | own, f"{where}, task {name}", folder)
        if tasks[name].task.startswith("CLOZE"):
            raise RecipeError(
                f"{where}, task {name}: {tasks[name].task} has a template of its own; train it by itself."
            )
    return MultiTaskRecipe(tasks, float(temperature))


class MultiTaskTrainer(Trainer):
    """Train one prompt on batches of several tasks, and measure each task by itself.

    Training logs have `loss_<task>` besides: losses of different tasks are no parts of one curve. Metrics are
    `eval_<task>_<metric>`, and `eval_mean`, the mean of the tasks' main metrics, each from 0 to 1. A
    checkpoint holds an adapter folder for each task.

    Args:
        model: of `get_multitask_model`.
        args: `remove_unused_columns` is turned off: which columns a batch has is up to its task. The best model is
            that of the greatest `mean`, where no metric is named, and early stopping looks for that.
        parts: name of a task to its features.
        processing_class: the tokenizer.
        temperature: of `TaskSampler`.
        kwargs: what a Trainer takes besides.

    Raises:
        PTuneError: the engine splits models over ranks (FSDP2, ZeRO); or labels are to be smoothed of tasks for which
            a Trainer that sees several models cannot do so.
    """

    control: Any

    def __init__(
        self,
        model: MultiTaskPrompt,
        args: TrainingArguments,
        parts: Mapping[str, Part],
        processing_class: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        for name, part in parts.items():
            if args.label_smoothing_factor and part.task.model_task not in _SMOOTHED:
                raise RecipeError(
                    f"training.label_smoothing_factor is {args.label_smoothing_factor}, but beside other tasks only "
                    f"those for {', '.join(_SMOOTHED)} take it, and {name} is {part.task.name}; leave it out, or train "
                    f"{name} by itself."
                )
        args.remove_unused_columns = False
        ends_early = any(isinstance(c, EarlyStoppingCallback) for c in kwargs.get("callbacks") or ())
        if (args.load_best_model_at_end or ends_early) and args.metric_for_best_model in (None, "loss"):
            args.metric_for_best_model, args.greater_is_better = "mean", True
        self.parts = dict(parts)
        self.temperature = temperature
        train = MultiTaskDataset({name: part.train for name, part in parts.items()})
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=MultiTaskDataset({name: part.held_out for name, part in parts.items()}),
            data_collator=TaskCollator({n: p.task.collator(processing_class) for n, p in parts.items()}),
            processing_class=processing_class,
            **kwargs,
        )
        for name in parts:  # the Trainer does so for a model of one task
            align_special_tokens(model.model_of(name), processing_class)
        self.prompts = model
        self.measured: dict[str, dict[str, float]] = {}  # by task, of the last evaluation
        # by task: sum and number of the losses since the last log
        self._losses = {name: torch.zeros(2, device=args.device) for name in parts}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = train_dataset or self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return TaskSampler(dataset.sizes, self._train_batch_size, self.temperature, seed)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What any Trainer computes, which is kept by task."""
        task = inputs[TASK_KEY]
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss: Tensor = (found[0] if isinstance(found, tuple) else found).detach()
        if model.training:
            self._losses[task] += torch.stack([loss, (loss != 0).to(loss.dtype)])  # 0 is that of no labels
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of tasks to a training log."""
        if "loss" in logs:
            together = self.accelerator.reduce(torch.stack(list(self._losses.values())), "sum").tolist()
            means = {n: total / count for n, (total, count) in zip(self._losses, together, strict=True) if count}
            logs |= {f"{TASK_LOSS}{n}": mean for n, mean in means.items() if math.isfinite(mean)}  # others are no JSON
            for kept in self._losses.values():
                kept.zero_()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure every task on its held-out features."""
        self.measured = {name: self.measure(name, part.held_out) for name, part in self.parts.items()}
        metrics = {
            f"{metric_key_prefix}_{name}_{metric}": value
            for name, found in self.measured.items()
            for metric, value in found.items()
        }
        main = [
            self.measured[n][p.task.metric] / (100 if p.task.metric in p.task.percent else 1)
            for n, p in self.parts.items()
        ]
        metrics[f"{metric_key_prefix}_mean"] = sum(main) / len(main)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, name: str, features: list[Feature]) -> dict[str, float]:
        """Measure one task on given features; nothing is logged."""
        arguments = copy.copy(self.args)
        arguments.report_to = []
        arguments.enable_jit_checkpoint = False  # SIGTERM is for the Trainer that trains
        part = self.parts[name]
        trainer = TaskTrainer(
            task=part.task,
            labels=part.labels,
            model=self.prompts.model_of(name),
            args=arguments,
            eval_dataset=features,
            processing_class=self.processing_class,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return evaluate(trainer)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not at_end(self):
            with counting_steps(self, [self.prompts.model_of(task) for task in self.prompts.tasks]):
                super()._run_epoch(*args, **kwargs)


def run(recipe: MultiTaskRecipe) -> dict[str, dict[str, float]]:
    """Train one prompt on all tasks, and save `adapter/<task>` for each.

    With `push_to_hub` each of them becomes a repository of its own at the end, `<hub_model_id>-<task>`.

    Args:
        recipe: what `make_multitask_recipe` returns.

    Returns:
        Metrics of the held-out rows by task; `test_` metrics besides where a task has test rows.

    Raises:
        PTuneError: data, base, method or a task's first batch do not fit.
        HubError: an adapter could not be pushed; all of them have been written.
    """
    arguments = make_arguments(recipe.shared)  # what is wrong there is told before data are read
    set_seed(recipe.shared.seed)
    tokenizer = load_tokenizer(recipe.shared.base, recipe.shared.base_options.get("revision"))
    model, parts = build(recipe, tokenizer)
    arguments = settle_arguments(arguments, recipe.shared, pairs=False, causal=model.config.over_decoder)
    # the Trainer would push them as one repository, which no Auto class reads by its name
    push, arguments.push_to_hub = arguments.push_to_hub, False
    trainer = make_multitask_trainer(recipe, arguments, model, parts, tokenizer)
    trainer.evaluate()
    before = trainer.measured
    train_on(trainer, *recipe.tasks.values())
    trainer.evaluate()
    folder = Path(recipe.shared.output_dir) / ADAPTER_FOLDER
    found: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        found[name] = trainer.measured[name]  # keys of the logs do not tell where a task's name ends
        if part.test:
            found[name] |= {f"test_{k}": v for k, v in trainer.measure(name, part.test).items()}
        if trainer.is_world_process_zero():
            metric = part.task.metric
            scores = f"{before[name][metric]:.3f} before, {found[name][metric]:.3f} after training"
            report(name, metric, scores, found[name].get(f"test_{metric}"))
            _finish(trainer, recipe, name, folder / name, found[name])
            print(f"  {folder / name}", flush=True)
    if push and trainer.is_world_process_zero():
        for name in parts:
            private, token = arguments.hub_private_repo, arguments.hub_token
            url = push_folder(folder / name, _repository(arguments, name), private=private, token=token)
            print(f"{name}: {url}", flush=True)
    trainer.accelerator.wait_for_everyone()
    return found


def make_multitask_trainer(
    recipe: MultiTaskRecipe,
    arguments: TrainingArguments,
    model: MultiTaskPrompt,
    parts: Mapping[str, Part],
    tokenizer: PreTrainedTokenizerBase,
) -> MultiTaskTrainer:
    """Put a Trainer around a model of several tasks, watched by the callbacks.

    Raises:
        PTuneError: a task's rows or its first batch do not fit the model, or fill no batch.
    """
    usual = recipe.shared.defaults(causal=model.config.over_decoder).training.get("learning_rate")
    watched_by = [LearningCallback(usual), MemoryCallback(), *scheduling(recipe.shared)]
    rates = make_optimizer(arguments, model, *recipe.shared.rates())
    with without_handler(arguments):
        trainer = MultiTaskTrainer(
            model, arguments, parts, tokenizer, recipe.temperature, callbacks=watched_by, optimizer_cls_and_kwargs=rates
        )
    check_batches(trainer)
    for name, part in parts.items():
        check_features(model.model_of(name), part.task, tokenizer, part.train)
        for features in filter(None, (part.held_out, part.test)):
            check_features(model.model_of(name), part.task, tokenizer, features, held_out=True)
        check_batch(model.model_of(name), part.task.collator(tokenizer)(part.train[:_GUARDED_ROWS]))
    return trainer


def report(name: str, metric: str, held_out: str, test: float | None) -> None:
    """Print what one of several tasks came to."""
    print(f"{name}: held-out {metric} {held_out}")
    if test is not None:
        print(f"  test {metric}: {test:.3f}")


def _finish(
    trainer: MultiTaskTrainer, recipe: MultiTaskRecipe, name: str, folder: Path, metrics: dict[str, float]
) -> None:
    """Write a task's adapter, tokenizer, facts and card."""
    model = trainer.prompts.model_of(name)
    save_tokenizer(trainer.processing_class, folder)
    part = trainer.parts[name]
    told = card_facts(recipe.tasks[name], part.rows, part.task, trainer.processing_class, part.train)
    told["hyperparameters"] |= {"temperature": recipe.temperature}
    others = [
        f"{other} ({one.task}: {', '.join(map(public_name, data_names(one)))})"
        for other, one in recipe.tasks.items()
        if other != name
    ]
    if others:
        further = f"Its prompt was trained for {', '.join(others)} too; the number of training rows is its own alone."
        told["limits"] = [*told.get("limits", []), further]
    facts = gather_facts(trainer.args, trainer.state, model, told)
    facts.metrics = [metrics]
    finish_folder(model, folder, _repository(trainer.args, name), facts=facts)


def _repository(arguments: TrainingArguments, task: str) -> str:
    """The repository of a task's adapter."""
    return f"{arguments.hub_model_id or Path(str(arguments.output_dir)).name}-{task}"


def build(
    recipe: MultiTaskRecipe, tokenizer: PreTrainedTokenizerBase, loaded: Mapping[str, Rows] | None = None
) -> tuple[MultiTaskPrompt, dict[str, Part]]:
    """Load rows, where none are given by task, and base of every task; base weights are held once."""
    parts: dict[str, Part] = {}
    backbones: dict[str, PreTrainedModel] = {}
    modules: dict[str, list[str]] = {}
    head_states: dict[str, str | None] = {}
    for name, one in recipe.tasks.items():
        task, config = one.build_task(), make_config(one)
        rows = load_rows(one) if loaded is None else loaded[name]
        if isinstance(task, GenerationTask):
            let_end(tokenizer)
        train, held_out, test = (
            task.encode(r, tokenizer, rows.labels, held_out=held) if r else []
            for r, held in ((rows.train, False), (rows.held_out, True), (rows.test, True))
        )
        parts[name] = Part(task, rows.labels, rows, train, held_out, test)
        backbones[name] = load_base(one.base, task.model_task, rows.labels, tokenizer, config, one.base_options)
        modules[name], head_states[name] = config.modules_to_save or [], config.head_states
        first = next(iter(backbones))
        # before the next one takes memory
        share_base(backbones[first], backbones[name], name, modules[first], modules[name])
    model = get_multitask_model(backbones, make_config(recipe.shared), tokenizer, modules, head_states)
    for name, part in parts.items():
        check_direction(model.model_of(name), part.task)
    return model, parts


def read_multitask_recipe(path: str, overrides: Sequence[str] = ()) -> MultiTaskRecipe:
    """Read a recipe file with `tasks`; arguments and errors are those of `read_recipe`."""
    return make_multitask_recipe(read_content(path, overrides), path, Path(path).parent)


def names_tasks(recipe: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a recipe names several tasks; `False` too where it cannot be read, which is said elsewhere."""
    try:
        return "tasks" in read_content(recipe, overrides)
    except RecipeError:
        return False


def read_any_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe | MultiTaskRecipe:
    """Read a recipe file, of one task or of several; arguments and errors are those of `read_recipe`."""
    read = read_multitask_recipe if names_tasks(path, overrides) else read_recipe
    return read(path, overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe that the command line names.

    Args:
        arguments: the recipe's path, then overrides `--section.key=value`; those of the process when unset.

    Returns:
        The exit code: 0, 2 after an error that has been printed, 130 after an interruption, or 143 after SIGTERM.
    """
    return command(
        "hf_ptune.train_multitask",
        "Train several tasks.",
        lambda *given: run(read_multitask_recipe(*given)),
        arguments,
    )


if __name__ == "__main__":
    leave(main())
