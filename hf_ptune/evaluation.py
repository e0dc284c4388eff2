"""Measure an adapter that is there on a recipe's held-out and test rows; nothing is trained."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_ptune.adapter_file import ADAPTER_FOLDER
from hf_ptune.arguments import make_arguments
from hf_ptune.backbone import is_hub_id, read_tokenizer
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.data import Rows, load_rows
from hf_ptune.errors import RecipeError, shorten
from hf_ptune.fresh_base import let_pad
from hf_ptune.hub import adapter_files
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.publishing import tokenizer_of
from hf_ptune.recipe import Recipe
from hf_ptune.row_checks import check_features
from hf_ptune.tasks import Task, TaskTrainer
from hf_ptune.templates import name_virtual_tokens
from hf_ptune.tokenization import has_tokenizer
from hf_ptune.train import count_rows, load_adapter
from hf_ptune.train import evaluate as measure
from hf_ptune.train_multitask import MultiTaskRecipe, report


def evaluate_tasks(recipe: MultiTaskRecipe, folder: str | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Load the adapter of each task and measure it.

    Args:
        recipe: names tasks, rows and batch size.
        folder: holds an adapter folder for each task; what the recipe's run left in its output folder when unset.

    Returns:
        What `evaluate` gives, by task.

    Raises:
        PTuneError: an adapter is missing, cannot be loaded, or was trained for other labels.
    """
    root = Path(folder or Path(recipe.shared.output_dir) / ADAPTER_FOLDER)
    for name in recipe.tasks:  # all of them before the first is measured
        if not (root / name).is_dir():
            raise RecipeError(
                f"{root / name} is no folder; train the recipe first, or name the folder around the adapters with "
                "--adapter."
            )
        adapter_files(root / name)
    found = {}
    for name, one in recipe.tasks.items():
        found[name] = evaluate(one, str(root / name), name)
        gc.collect()  # before the next base is loaded
    if PartialState().is_main_process:
        for name, measured in found.items():
            metric = recipe.tasks[name].build_task().metric
            report(name, metric, f"{measured['held-out'][metric]:.3f}", measured.get("test", {}).get(metric))
            print(f"  {root / name}", flush=True)
    return found


def evaluate(recipe: Recipe, adapter: str | None = None, name: str = "") -> dict[str, dict[str, float]]:
    """Load an adapter and measure it.

    Args:
        recipe: names task, rows and batch size; base and method are the adapter's own.
        adapter: folder or id on the Hub; what the recipe's run left in its output folder when unset.
        name: of the task, where it is one of several; begins what is printed.

    Returns:
        Metrics of the held-out rows, and of the test rows where the recipe names some, by `held-out` and `test`.

    Raises:
        PTuneError: the adapter cannot be loaded, or was trained for other labels or another template.
    """
    source = adapter or str(Path(recipe.output_dir) / ADAPTER_FOLDER)
    if Path(source).is_dir():
        adapter_files(source)  # else transformers says something of its own
    elif adapter is None or not is_hub_id(source):
        raise RecipeError(f"{source} is no folder; train the recipe first, or name an adapter with --adapter.")
    idle = {"push_to_hub": False, "enable_jit_checkpoint": False}  # of what only a training does
    arguments = make_arguments(replace(recipe, training=recipe.training | idle))
    task, rows = recipe.build_task(), load_rows(recipe)
    model = load_adapter(source, task, recipe.base_options)
    _check_fit(model, source, task, rows)
    tokenizer = _read_tokenizer(model.config, source)
    parts = {"held-out": rows.held_out} | ({"test": rows.test} if rows.test else {})
    features = {name: task.encode(part, tokenizer, rows.labels, held_out=True) for name, part in parts.items()}
    for part in features.values():
        check_features(model, task, tokenizer, part, held_out=True)
    trainer = TaskTrainer(
        task=task,
        labels=rows.labels,
        model=model,
        args=arguments,
        eval_dataset=features["held-out"],
        processing_class=tokenizer,
    )
    found = {name: measure(trainer, part if name == "test" else None) for name, part in features.items()}
    if trainer.is_world_process_zero():
        begin = f"{name}: " if name else ""
        for kind, metrics in found.items():
            shown = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
            print(f"{begin}{kind}, {count_rows(parts[kind], features[kind])} rows: {shown}", flush=True)
    return found


def _read_tokenizer(config: PTuneConfig, source: str) -> Any:
    """The adapter's own tokenizer or its base's, with padding and the template's virtual tokens."""
    try:
        tokenizer = read_tokenizer(source) if has_tokenizer(source) else tokenizer_of(config)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the tokenizer of {source} cannot be read ({shorten(error)}); put the one that it was trained with beside "
            "the adapter: tokenizer.save_pretrained(folder)."
        ) from error
    if tokenizer is None:
        raise RecipeError(
            f"{source} has no tokenizer, and neither has its base {config.base_model_name_or_path}; put the one that "
            "it was trained with beside the adapter: tokenizer.save_pretrained(folder)."
        )
    let_pad(tokenizer, source)
    name_virtual_tokens(config, tokenizer)
    return tokenizer


def _check_fit(model: object, source: str, task: Task, rows: Rows) -> None:
    """Refuse what would be measured against labels or texts of another kind than it was trained on."""
    if not isinstance(model, PTunePreTrainedModel):
        raise RecipeError(f"{source} holds a {type(model).__name__}, and no adapter; name a folder that training left.")
    wanted = task.config_options()
    for name in ("template", "verbalizer"):
        own, value = getattr(model.config, name), wanted.get(name)
        if own != value:
            raise RecipeError(
                f"{source} was trained with {name} {own!r}, and the recipe has {value!r}; set task_options.{name} to "
                "what the adapter has."
            )
    names = model.config.label_names
    if task.label_role is not None and not wanted and names != rows.labels:
        raise RecipeError(
            f"{source} was trained for the labels {names}, and the rows have {rows.labels}; give data.labels the names "
            "in the adapter's order."
        )
