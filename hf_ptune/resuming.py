"""What a checkpoint and a run that goes on from it have to share."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from hf_ptune.backbone import place_of
from hf_ptune.base_settings import are_named
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import PTuneError, RecipeError
from hf_ptune.methods import get_method
from hf_ptune.placement import settled_reading

logger = logging.get_logger(__name__)
# options on which names and shapes of an adapter's tensors depend
_SHAPING: tuple[str, ...] = ("num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size")
_SHAPING += ("encoder_num_layers", "layers", "sites")
# and what they mean
_CHOOSING: tuple[str, ...] = ("modules_to_save", "train_backbone", "template")
_RUN_NAME, _ROWS, _LABELS = "ptune_run.json", "training rows", "training labels"
_CHANGED_BY = {
    _ROWS: "data.source, split_seed, limit, max_length",
    _LABELS: "classes, tags, targets or answers in data.source",
}
_HELD_OUT = "held-out rows"
_STEP = "rows a step"
_LEARNED = ("labels", "start_positions", "end_positions")
# a checkpoint's optimizer goes on with settings of its own, whatever is asked for, and the seeds say which rows are
# still to come
_OF_OPTIMIZERS: tuple[str, ...] = ("learning_rate", "optim", "optim_args", "weight_decay")
_OF_OPTIMIZERS += ("adam_beta1", "adam_beta2", "adam_epsilon")
_SHARED = {"seed": "seed", "data_seed": "training.data_seed"} | {name: f"training.{name}" for name in _OF_OPTIMIZERS}
# what orders the rows of one task besides, and tells how many steps an epoch has
_ORDERING: tuple[str, ...] = ("train_sampling_strategy", "dataloader_drop_last")
# schedules that follow measurements, whose settings a checkpoint keeps; all others are made anew from the recipe's
MEASURING = ("reduce_lr_on_plateau", "greedy")
_SCHEDULE: tuple[str, ...] = ("training.lr_scheduler_type", "training.lr_scheduler_kwargs")
Rates = tuple[float | None, float | None]  # of backbone and head, where they have their own


class RunCallback(TrainerCallback):
    """Write into every checkpoint which rows it has been trained and measured on, and how.

    Batch size and ranks may change where a run goes on, but the Trainer tells from the number of steps which rows are
    still to come.

    A run that goes on measures other held-out rows than the checkpoint's, or in another way, where it is told to; what
    was measured before stands in no table with that, and is dropped.

    Args:
        trainer: about to train.
        rates: what `Recipe.rates` returns.
        measured: tells how held-out rows are measured.
    """

    def __init__(self, trainer: Trainer, rates: Rates, measured: str) -> None:
        self.facts = _facts_of(trainer, rates)
        self._trainer = trainer
        held_out = hashlib.sha256(measured.encode())
        for row in trainer.eval_dataset or ():
            held_out.update(repr(sorted(row.items())).encode())
        self._held_out = held_out.hexdigest()
        self._measured_anew = False
        self._rows_before: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what was measured of other held-out rows, or in another way, and say what does not fit."""
        rows = self._trainer.get_total_train_batch_size(args)  # auto_find_batch_size has found it by now
        if (before := self._rows_before) not in (None, rows) and state.is_world_process_zero:
            logger.warning(
                f"a step had {before} rows in the run that goes on from step {state.global_step}, and has {rows} here "
                "(per_device_train_batch_size times gradient_accumulation_steps times processes). Epochs and rows are "
                f"told from the number of steps, so that some rows come again or are left out; with {before} rows a "
                "step it goes on where it was."
            )
        if self._measured_anew:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            kept = [entry for entry in state.log_history if not any(k.startswith("eval_") for k in entry)]
            if len(kept) < len(state.log_history) and state.is_world_process_zero:
                logger.warning(
                    f"what was measured up to step {state.global_step} was of other held-out rows, or in another way, "
                    "and is left out of history and card; the best model is looked for from here on. Give data and "
                    "task_options as that run had them to keep it."
                )
            state.log_history = kept

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file, on the first rank."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            rows = self._trainer.get_total_train_batch_size(args)
            facts = self.facts | {_HELD_OUT: self._held_out, _STEP: rows}
            (folder / _RUN_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def check(self, checkpoint: str) -> None:
        """Refuse a checkpoint that was trained on other rows, or with what a run that goes on could not change.

        Args:
            checkpoint: folder; one that does not say how it came about is taken.

        Raises:
            RecipeError: something differs; it says what.
        """
        try:
            there = json.loads((Path(checkpoint) / _RUN_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        measures = {there.get(_SCHEDULE[0]), self.facts[_SCHEDULE[0]]} & set(MEASURING)
        differ = [
            f"its {name} are others ({_CHANGED_BY[name]})"
            if name in _CHANGED_BY
            else f"{name} is {there[name]} there and {here} here"
            for name, here in self.facts.items()
            if there.get(name, here) != here and (name not in _SCHEDULE or measures)
        ]
        if differ:
            raise RecipeError(_told(checkpoint, differ))
        self._rows_before = there.get(_STEP)
        self._measured_anew = there.get(_HELD_OUT, self._held_out) != self._held_out


def _facts_of(trainer: Trainer, rates: Rates) -> dict[str, Any]:
    rows, labels = hashlib.sha256(), hashlib.sha256()
    for row in trainer.train_dataset or ():
        rows.update(repr(row["input_ids"]).encode())
        labels.update(repr([row.get(name) for name in _LEARNED]).encode())
    settings = trainer.args.to_dict()
    shared = {name: settings[key] for key, name in _SHARED.items()}
    shared["training.optim_args"] = shared["training.optim_args"] or None
    options = settings["lr_scheduler_kwargs"] or {}
    shared |= dict(zip(_SCHEDULE, (settings["lr_scheduler_type"], dict(sorted(options.items()))), strict=True))
    if (temperature := getattr(trainer, "temperature", None)) is not None:
        shared["temperature"] = temperature  # which rows of several tasks are still to come
    else:
        shared |= {f"training.{name}": settings[name] for name in _ORDERING}
        seedable = trainer.args.accelerator_config.use_seedable_sampler
        shared["training.accelerator_config.use_seedable_sampler"] = seedable
    shared |= dict(zip(("backbone_learning_rate", "head_learning_rate"), rates, strict=True))
    return {name: str(value) for name, value in shared.items()} | {
        _ROWS: rows.hexdigest(),
        _LABELS: labels.hexdigest(),
    }


def _told(checkpoint: str | Path, differ: list[str]) -> str:
    return (
        f"{checkpoint} is of another run: {'; '.join(differ)}. Give the old values to go on with it, or another "
        "output_dir to train anew."
    )


def check_checkpoint(model: Any, checkpoint: str, of_a_recipe: bool = True) -> None:
    """Refuse a checkpoint of a run with another base, method or labels, or with other sizes of the prompt.

    Args:
        model: about to train: a wrapped model, or one of several tasks.
        checkpoint: folder of a Trainer's checkpoint.
        of_a_recipe: whether a recipe says how it trains; else the base is not compared, which may be a moved one.

    Raises:
        RecipeError: something differs; it says what. Without a recipe a PTuneError.
        AdapterFileError: the checkpoint's config.json cannot be read.
        ConfigError: it describes no adapter.
    """
    parts = {Path(checkpoint): model}
    if hasattr(model, "model_of"):
        parts = {Path(checkpoint) / task: model.model_of(task) for task in model.tasks}
    for folder, part in parts.items():
        if not (folder / CONFIG_NAME).is_file():
            continue
        if differ := differences(PTuneConfig.from_pretrained(folder), part.config, of_a_recipe):
            raise (RecipeError if of_a_recipe else PTuneError)(_told(folder, differ))


def differences(there: PTuneConfig, here: PTuneConfig, of_a_recipe: bool = False) -> list[str]:
    """What an adapter would mean something else by than a model that takes over its tensors, in words.

    Args:
        there: of the adapter.
        here: of the model.
        of_a_recipe: whether options are called as in recipes, and the base is compared too.
    """
    told: list[tuple[str, Any, Any]] = [("method", there.method, here.method)]
    where = "options." if of_a_recipe else ""
    if there.method == here.method:  # options of the one may mean nothing to the other
        names = _CHOOSING if get_method(here.method).kind is None else _SHAPING + _CHOOSING
        told += [(f"{where}{name}", getattr(there, name), getattr(here, name)) for name in names]
        reading = settled_reading(there), settled_reading(here)
        told += [(f"{where}{name}", value, reading[1][name]) for name, value in reading[0].items()]
    # those without names of their own are whoever's, as where one adapter is loaded
    if of_a_recipe or (are_named(there.id2label) and are_named(here.id2label)):
        told.append(("labels", there.label_names, here.label_names))
    bases = there.base_model_name_or_path, here.base_model_name_or_path
    if of_a_recipe and all(bases) and place_of(str(bases[0])) != place_of(str(bases[1])):
        told.insert(0, ("base", *bases))
    commits = there.base_model_revision, here.base_model_revision
    if of_a_recipe and all(commits):
        told.append(("commit of the base", *commits))
    return [f"{name} is {old!r} there and {new!r} here" for name, old, new in told if old != new]
