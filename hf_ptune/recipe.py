"""A recipe: one YAML file that names base, method, data and training of a run."""

import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from hf_ptune.backbone import has_head
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.defaults import Defaults, defaults_of
from hf_ptune.errors import RecipeError
from hf_ptune.methods import method_names
from hf_ptune.presets import fill_from_preset
from hf_ptune.tasks import Task, get_task, task_names

Column = str | list[str]
# what a run writes into the configuration itself
_NOT_OPTIONS = {"model_type", "sub_configs", "method", "flattened", "task", "geometry"} | {
    f"base_{name}" for name in ("model_name_or_path", "model_revision", "class", "config")
}
# what a task reads its rows through, and so writes itself
_NOT_OPTIONS |= {"template", "verbalizer", "virtual_token_ids"}
_VARIANT = "--variant="
_BACKBONE_RATE = 1e-5  # Liu et al. 2021, section 4.2
_BASE_OPTIONS = {
    "revision": str | None,
    "dtype": typing.Literal["auto", "float32", "bfloat16", "float16", "float64"] | None,
    "attn_implementation": str | None,
    "quantization_config": dict[str, Any] | None,
}
_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
# keys, of any section, that may hold a path
_PATHS: tuple[str, ...] = ("base", "output_dir", "source", "eval_source", "test_source", "labels")
_PATHS += ("prompt_tuning_init_adapter", "resume_from_checkpoint", "deepspeed", "fsdp_config", "accelerator_config")
# keys of the recipe's own
_NOT_TRAINING = ("output_dir", "seed")


@dataclass(frozen=True)
class DataRecipe:
    """Say where the rows are and which columns hold what.

    Args:
        source: "chatterbot"; a .jsonl, .json, .csv, .tsv or .parquet file, relative to the recipe's folder; or
            `hub:<id>` of a dataset on the Hub.
        config: configuration of a dataset on the Hub; where `source` is one, others are read without it, or with
            their own.
        revision: its commit or branch, likewise; "refs/convert/parquet" has the rows of those that are a script.
        split: its split to train on.
        eval_source: source of the held-out rows; unset, a part of the training rows is held out.
        where: column to value; of all sources only rows that have it are taken.
        eval_split: split of the held-out rows, of the same dataset where `eval_source` is unset.
        eval_config: configuration that they are in; of the same dataset `config` when unset, else none.
        eval_fraction: the part that is held out, more than 0 and less than 1; stratified by label.
        test_source: source of rows that are evaluated once, at the end.
        test_split: their split, of the same dataset where `test_source` is unset.
        test_config: their configuration, likewise.
        split_seed: seed of the split, and of `limit`.
        limit: number of training rows that are drawn, stratified by label; all when unset.
        eval_limit: number of held-out and of test rows that are drawn, likewise.
        columns: role to column, where they differ. A column is a name, `a.b` for a value inside column a, a text
            with `{names}` of columns, or a list of columns. The roles are those of the task.
        labels: names of the labels in order of their numbers, or a .json file that holds them (a list, or lists
            by column); unset, a labels.json beside the file, the names that a dataset of the Hub has, or a Parquet
            file that `datasets` wrote, or the values in all rows of `source`, sorted. Whole numbers among the labels
            are names where all of them are.
        max_length: tokens that a row is cut to.
    """

    source: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    where: dict[str, Any] = field(default_factory=dict)
    eval_source: str | None = None
    eval_split: str | None = None
    eval_config: str | None = None
    eval_fraction: float = 0.25
    test_source: str | None = None
    test_split: str | None = None
    test_config: str | None = None
    split_seed: int = 0
    limit: int | None = None
    eval_limit: int | None = None
    columns: dict[str, Column] = field(default_factory=dict)
    labels: list[str] | str | None = None
    max_length: int = 128


@dataclass(frozen=True)
class CardRecipe:
    """Say what the card cannot know from the run.

    Args:
        base: the base's id on the Hub, where it is loaded by another name.
        datasets: ids or names of the data; the name of `data.source` when unset.
        languages: ISO codes.
        license: of the adapter; that of its base on the Hub where unset.
        limits: sentences on what to know before use.
    """

    base: str | None = None
    datasets: list[str] | None = None
    languages: list[str] | None = None
    license: str | None = None
    limits: list[str] | None = None


@dataclass(frozen=True)
class Recipe:
    """Name everything that a run needs.

    Args:
        base: Hub id, local folder, or `package:<module>/<folder>`.
        base_options: how it is loaded: `revision` (a commit or branch), `dtype`, `attn_implementation`,
            `quantization_config` (with its `quant_method`), as `from_pretrained` takes them.
        task: name of a registered task.
        method: a method of PTuneConfig.
        output_dir: folder of the checkpoints; its subfolder `adapter` takes the finished adapter.
        data: where the rows are.
        task_options: fields of the task.
        options: further fields of PTuneConfig.
        training: fields of TrainingArguments.
        backbone_learning_rate: that of a backbone that trains along (`options.train_backbone`); 1e-5 when unset, as
            Liu et al. 2021 take it.
        head_learning_rate: that of the task's head; the prompt's when unset, or the method's default where the recipe
            names no learning rate at all.
        learning_rate_decay: factor by which all learning rates fall with every epoch, more than 0 and at most 1, on
            top of `training.lr_scheduler_type`.
        early_stopping_patience: evaluations after which training ends, if none of them was better than the best
            before by `training.metric_for_best_model` ("loss" when unset, of several tasks "mean"); needs
            `training.eval_strategy`.
        seed: seed of the prompt, the head and the training.
        card: what the card should say besides.
        folder: where the recipe stands; paths of data start there.
    """

    base: str
    task: str
    method: str
    output_dir: str
    data: DataRecipe
    base_options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    backbone_learning_rate: float | None = None
    head_learning_rate: float | None = None
    learning_rate_decay: float | None = None
    early_stopping_patience: int | None = None
    seed: int = 0
    card: CardRecipe = field(default_factory=CardRecipe)
    folder: Path = Path(".")

    def build_task(self) -> Task:
        """The task, with its options."""
        return get_task(self.task)(max_length=self.data.max_length, **self.task_options)

    def defaults(self, pairs: bool = False, causal: bool = False) -> Defaults:
        """What its method starts with, for its task, where it is silent.

        Args:
            pairs: whether its rows have two texts.
            causal: whether its base is a decoder.
        """
        return defaults_of(self.method, self.build_task().model_task, pairs, self.epochs, causal)

    @property
    def epochs(self) -> float | None:
        """Passes over its rows; `None` where it counts steps."""
        by_steps = self.training.get("max_steps", -1) > 0
        return None if by_steps else float(self.training.get("num_train_epochs", TrainingArguments.num_train_epochs))

    def rates(self) -> tuple[float | None, float | None]:
        """Learning rates of backbone and head; `None` where they have none of their own."""
        backbone, head = self.backbone_learning_rate, self.head_learning_rate
        if backbone is None and self.options.get("train_backbone"):
            backbone = _BACKBONE_RATE
        if head is None and "learning_rate" not in self.training and has_head(self.build_task().model_task):
            head = self.defaults().head_learning_rate
        return backbone, head


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: the YAML file.
        overrides: `--key=value` or `--section.key=value`; the value is YAML. `--variant=name` takes the changes that
            the file has under `variants`, before all others.

    Raises:
        RecipeError: the file is missing or no YAML; a key is unknown, missing or of the wrong type.
    """
    return make_recipe(read_content(path, overrides), str(path), Path(path).parent)


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read what a recipe file says, unchecked; arguments and errors are those of `read_recipe`."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); expected a YAML file.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds {_name(content)}, expected keys such as base, task and method.")
    variants = content.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise RecipeError(f"{path}: variants holds {_name(variants)}; expected names, each with keys and values.")
    for name in (o.removeprefix(_VARIANT) for o in overrides if o.startswith(_VARIANT)):
        if name not in variants:
            there = ", ".join(variants) or "none"
            raise RecipeError(f"{path}: there is no variant {name!r}; expected one of those it has: {there}.")
        content = _changed(content, variants[name])
    for override in overrides:
        if not override.startswith(_VARIANT):
            _override(content, override, str(path))
    return content


def _changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A section with other values, key by key; a key that is changed to nothing is left out."""
    merged = {k: v for k, v in content.items() if changes.get(k, v) is not None}
    for key, value in changes.items():
        own = content.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            merged[key] = _changed(own, value)
        elif value is not None:
            merged[key] = value
    return merged


def make_recipe(content: Mapping[str, Any], where: str = "recipe", folder: Path = Path(".")) -> Recipe:
    """Check the content of a recipe file.

    Args:
        content: what the YAML says; its key `preset` names a published setting that fills what it leaves out.
        where: the file's name, for messages.
        folder: where paths of data start.

    Raises:
        RecipeError: a key is unknown, missing or of the wrong type.
    """
    if "tasks" in content:
        raise RecipeError(
            f"{where}: names several tasks; one is expected here. hf-ptune train, or -m hf_ptune.train_multitask, "
            "trains them; to train one of them alone, put it under task and data in a recipe of its own, or in a "
            "variant with tasks: null."
        )
    top = {n: h for n, h in typing.get_type_hints(Recipe).items() if n not in ("folder", "data", "card")}
    given = _section(
        fill_from_preset(content, where), top | {"data": dict[str, Any], "card": dict[str, Any]}, where, ""
    )
    _need(given, Recipe, where, "")
    if given["task"] not in task_names():
        raise RecipeError(f"{where}: task is {given['task']!r}; expected one of {', '.join(task_names())}.")
    if given["method"] not in method_names():
        raise RecipeError(
            f"{where}: unknown method {given['method']!r}; {_nearest(given['method'], method_names(), '')}"
        )
    data = _section(given["data"], typing.get_type_hints(DataRecipe), where, "data.")
    _need(data, DataRecipe, where, "data.")
    if not 0 < data.get("eval_fraction", 0.5) < 1:
        raise RecipeError(f"{where}: data.eval_fraction is {data['eval_fraction']}; expected between 0 and 1.")
    for key in ("max_length", "limit", "eval_limit"):
        if (value := data.get(key)) is not None and value < 1:
            raise RecipeError(f"{where}: data.{key} is {value}; expected 1 or more.")
    sections = {
        "base_options": _section(given.get("base_options", {}), _BASE_OPTIONS, where, "base_options."),
        "task_options": _section(given.get("task_options", {}), _task_types(given["task"]), where, "task_options."),
        "options": _section(given.get("options", {}), _option_types(), where, "options."),
        "training": _section(given.get("training", {}), _training_types(), where, "training."),
    }
    card = _section(given.get("card", {}), typing.get_type_hints(CardRecipe), where, "card.")
    given, data = _at_home(given, _PATHS), _at_home(data, _PATHS)
    sections |= {name: _at_home(section, _PATHS) for name, section in sections.items()}
    own = {"data": DataRecipe(**data), "card": CardRecipe(**card), "folder": folder}
    recipe = Recipe(**(given | sections | own))
    if not 0 <= recipe.seed < 2**32:
        raise RecipeError(f"{where}: seed is {recipe.seed}; expected a whole number from 0 to {2**32 - 1}.")
    for key, least in _LEAST.items():
        if isinstance(value := recipe.training.get(key), (int, float)) and value < least:
            raise RecipeError(f"{where}: training.{key} is {value}; expected {least} or more.")
    if (value := recipe.training.get("learning_rate")) is not None and value <= 0:
        raise RecipeError(f"{where}: training.learning_rate is {value}; expected more than 0.")
    rate = recipe.backbone_learning_rate
    if rate is not None and (rate <= 0 or not recipe.options.get("train_backbone")):
        raise RecipeError(
            f"{where}: backbone_learning_rate is {rate}; expected more than 0, and options.train_backbone: true."
        )
    if recipe.head_learning_rate is not None and recipe.head_learning_rate <= 0:
        raise RecipeError(f"{where}: head_learning_rate is {recipe.head_learning_rate}; expected more than 0.")
    if recipe.learning_rate_decay is not None and not 0 < recipe.learning_rate_decay <= 1:
        raise RecipeError(
            f"{where}: learning_rate_decay is {recipe.learning_rate_decay}; expected more than 0 and at most 1."
        )
    if recipe.early_stopping_patience is not None and recipe.early_stopping_patience < 1:
        raise RecipeError(f"{where}: early_stopping_patience is {recipe.early_stopping_patience}; expected 1 or more.")
    try:
        recipe.build_task()
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return recipe


def _at_home(section: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A section whose paths may begin with `~`, the user's own folder, with that folder's path in its place.

    Args:
        section: of a recipe.
        names: keys that may hold a path.
    """
    return {k: os.path.expanduser(v) if k in names and isinstance(v, str) else v for k, v in section.items()}


def _task_types(name: str) -> dict[str, Any]:
    hints = typing.get_type_hints(get_task(name))
    return {f.name: hints[f.name] for f in fields(get_task(name)) if f.name != "max_length"}


def _option_types() -> dict[str, Any]:
    own = PTuneConfig.__annotations__
    return {n: hint for n, hint in own.items() if n not in _NOT_OPTIONS}


def _training_types() -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    hints["resume_from_checkpoint"] = str | bool | None  # true for the last one
    return {f.name: hints[f.name] for f in fields(TrainingArguments) if f.init and f.name not in _NOT_TRAINING}


def _override(content: dict[str, Any], override: str, where: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or not key:
        raise RecipeError(f"{where}: the override {override!r} is not of the form --key=value or --section.key=value.")
    *sections, last = key.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{where}: the override {override!r} enters {section}, which holds {_name(inner)}.")
        content = inner
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: the value of the override {override!r} is no YAML: {error}") from error


def _section(content: Any, types: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where}: {prefix.rstrip('.')} holds {_name(content)}; expected keys and values.")
    for key in content:
        if key not in types:
            raise RecipeError(f"{where}: unknown key {prefix}{key}; {_nearest(str(key), types, prefix)}")
    return {key: _typed(value, types[key], f"{where}: {prefix}{key}") for key, value in content.items()}


def _need(given: Mapping[str, Any], cls: Any, where: str, prefix: str) -> None:
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in needed if given.get(n) is None]:
        has = ", ".join(map(str, given)) or "none"
        raise RecipeError(f"{where}: {prefix}{missing[0]} is missing; expected {', '.join(needed)}; found {has}.")


def _nearest(key: str, valid: Iterable[str], prefix: str) -> str:
    if not prefix:
        for section, types in (("training", _training_types()), ("options", _option_types())):
            if key in types:
                return f"did you mean {section}.{key}?"
    if found := difflib.get_close_matches(key, valid, 1, 0.5):
        return f"did you mean {prefix}{found[0]}?"
    names = sorted(valid)
    return f"expected one of {', '.join(names[:20])}{', …' if len(names) > 20 else ''}."


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as its type wants it.

    Raises:
        RecipeError: it is of another type.
    """
    choices = _choices(hint)
    if float in choices and not isinstance(value, bool):
        if isinstance(value, int):
            return float(value) if int not in choices else value
        # YAML 1.1 reads 1e-3, without a point, as text
        if isinstance(value, str) and str not in choices:
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
    if Any in choices or any(_is(value, choice) for choice in choices):
        return value
    # YAML 1.1 reads `no`, without quotes, as a truth value
    if value is False and any(
        isinstance(c, type) and issubclass(c, Enum) and "no" in [m.value for m in c] for c in choices
    ):
        return "no"
    expected = " or ".join(dict.fromkeys(_spell(c) for c in choices))
    keys = [k for k in value if not isinstance(k, str)] if isinstance(value, dict) else []
    cure = f"; write the key {keys[0]!r} in quotes" if keys else ""
    raise RecipeError(f"{where} is {value!r} ({_name(value)}); expected {expected}{cure}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, choice) for choice in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_is(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is(k, inner[0]) and (inner[1] is Any or _is(v, inner[1])) for k, v in value.items()
        )
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def _name(value: Any) -> str:
    return {"NoneType": "nothing", "dict": "keys and values"}.get(type(value).__name__, type(value).__name__)
