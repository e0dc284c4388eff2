"""A recipe's training section as the Trainer takes it, refused where that could not work."""

from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from hf_ptune.errors import RecipeError
from hf_ptune.recipe import Recipe
from hf_ptune.resuming import MEASURING

_AT_ONCE = "tasks measure all held-out rows at once"
_ALWAYS = (
    "a recipe trains, measures its held-out rows before and after, and its test rows (data.test_source) at the end"
)
_CASTS = (
    "it casts the model for good, what is trained too; bf16: true evaluates in bfloat16 and keeps weights as they are, "
    "and base_options.dtype: bfloat16 loads the base in it"
)
_REFUSED = {
    "batch_eval_metrics": (True, _AT_ONCE),
    "prediction_loss_only": (True, _AT_ONCE),
    "eval_do_concat_batches": (False, _AT_ONCE),
    "do_train": (False, _ALWAYS),
    "do_eval": (False, _ALWAYS),
    "do_predict": (True, _ALWAYS),
    "eval_on_start": (False, _ALWAYS),
    "bf16_full_eval": (True, _CASTS),
    "fp16_full_eval": (True, _CASTS),
}


def make_arguments(recipe: Recipe, pairs: bool = False, causal: bool = False) -> TrainingArguments:
    """Turn a recipe's training section into TrainingArguments; its method's defaults fill what it leaves out.

    Args:
        recipe: names method, task and what is set.
        pairs: whether its rows have two texts.
        causal: whether its base is a decoder.

    Raises:
        RecipeError: values that transformers refuses, or that leave nothing to train or to measure.
    """
    settings: dict[str, Any] = {"dataloader_pin_memory": torch.accelerator.is_available()}
    settings |= recipe.defaults(pairs, causal).training | recipe.training
    if settings.get("max_steps") == 0 or (settings.get("max_steps", -1) < 0 and settings.get("num_train_epochs") == 0):
        raise RecipeError("training.max_steps or num_train_epochs is 0; expected a step at least (max_steps: 1).")
    for name, (refused, why) in _REFUSED.items():
        if settings.get(name) is refused:
            raise RecipeError(f"training.{name} is {str(refused).lower()}, but {why}; leave it out.")
    if settings.get("label_smoothing_factor") and recipe.build_task().model_task == "QUESTION_ANS":
        raise RecipeError(
            f"training.label_smoothing_factor is {settings['label_smoothing_factor']}, but the loss of {recipe.task} "
            "is its model's own, which smooths nothing; leave it out."
        )
    if recipe.learning_rate_decay is not None and settings.get("lr_scheduler_type") in MEASURING:
        raise RecipeError(
            f"training.lr_scheduler_type is {settings['lr_scheduler_type']}, which follows measurements, beside "
            "learning_rate_decay; set it to constant, or leave one of them out."
        )
    if recipe.early_stopping_patience is not None:
        if settings.get("eval_strategy", "no") == "no":
            raise RecipeError(
                "early_stopping_patience counts evaluations, but training.eval_strategy is no; set "
                "training.eval_strategy: epoch, or steps with training.eval_steps."
            )
        if settings.get("metric_for_best_model") is None:
            settings["metric_for_best_model"] = "loss"
    try:
        arguments = TrainingArguments(output_dir=recipe.output_dir, seed=recipe.seed, **settings)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training: {error}") from error
    _try_arguments(arguments)
    return arguments


def _try_arguments(arguments: TrainingArguments) -> None:
    """Refuse what a Trainer would find wrong only when base and data have been loaded."""
    if wrong := [p for p in (arguments.optim_args or "a=b").split(",") if p.count("=") != 1]:
        raise RecipeError(
            f"training.optim_args is {arguments.optim_args!r}, of which {wrong[0]!r} names no value; expected "
            "name=value, with commas between several."
        )
    rate, steps = arguments.learning_rate, arguments.max_steps if arguments.max_steps > 0 else 100
    schedule, options = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        get_scheduler(schedule, optimizer, arguments.get_warmup_steps(steps), steps, scheduler_specific_kwargs=options)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"training.lr_scheduler_type is {schedule.value} with lr_scheduler_kwargs {options}: {error}. Give "
            "lr_scheduler_kwargs what that schedule takes, or take another one, such as linear."
        ) from error
    for name in arguments.report_to:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except (ValueError, ImportError, RuntimeError) as error:
            raise RecipeError(
                f"training.report_to names {name}: {error} Install it, or set training.report_to: none."
            ) from error


def settle_arguments(arguments: TrainingArguments, recipe: Recipe, pairs: bool, causal: bool) -> TrainingArguments:
    """What `make_arguments` makes when rows and base are known, on which some defaults of a method depend.

    Args:
        arguments: what it made before; taken as they are where nothing depends on that.
        recipe: comes first in what it sets.
        pairs: whether its rows have two texts.
        causal: whether its base is a decoder.
    """
    if recipe.defaults(pairs, causal).training == recipe.defaults().training:
        return arguments
    # anew, and not in place: an engine's own file may have taken rates of them
    return make_arguments(recipe, pairs, causal)


def check_batches(trainer: Trainer) -> None:
    """Refuse training rows of which `dataloader_drop_last` leaves no batch.

    Raises:
        RecipeError: they fill none.
    """
    arguments = trainer.args
    if arguments.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        rows, batch = len(trainer.train_dataset), arguments.train_batch_size * arguments.world_size
        raise RecipeError(
            f"{rows} rows to train on fill no batch of {batch} (training.per_device_train_batch_size times processes), "
            "and training.dataloader_drop_last drops what is not full; lower per_device_train_batch_size, or leave "
            "dataloader_drop_last out."
        )
