"""Gather the facts of a run, and write the card; the Trainer's own card gives way to it."""

import importlib.metadata
import inspect
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_ptune
from hf_ptune.adapter_file import WEIGHTS_NAME, read_tensors
from hf_ptune.backbone import is_hub_id
from hf_ptune.cards import TEST, TIMES, RunFacts, ends_training, public_name
from hf_ptune.engines import engine_name, ours, replaces, splits
from hf_ptune.facts import RUN, model_facts
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.publishing import finish_folder, inherit_license

_HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "gradient_checkpointing",
)
_CHECKPOINT = "_ptune_checkpoint"  # on a Trainer while it writes one
_PUSH = "_ptune_push"  # on a Trainer while it pushes
_LIBRARIES = ("transformers", "torch", "accelerate", "datasets")
_MEMORY = re.compile("mem_([a-z_]+)_mib(?:_rank([0-9]+))?")
_SPEED = ("step_time_s", "tokens_per_second", "train_runtime")


class ModelCardCallback(TrainerCallback):
    """Write the facts of a run into its output folder when training ends; the card of a push is made of them.

    Args:
        datasets: ids or names of the training data, the one that was evaluated on first.
        languages: ISO codes of its languages.
        license: of the adapter; that of its base on the Hub where unset.
        example: an input for the card's snippet; a dict of `text` and `text_pair` where SEQ_CLS reads pairs, of
            its fields where a template has a gap, the messages before an answer where a chat template writes them.
        limits: sentences on what to know before use.
        base: the base's id on the Hub, where it was loaded by another name.
        hyperparameters: settings that no TrainingArguments tell, by their names.
        closing: tokens that the tokenizer puts behind every text, where prompts of CAUSAL_LM were trained without them.

    Attributes:
        facts: of the run, after training.
    """

    def __init__(
        self,
        datasets: list[str] | None = None,
        languages: list[str] | None = None,
        license: str | None = None,
        example: str | dict[str, str] | list[dict[str, str]] | None = None,
        limits: list[str] | None = None,
        base: str | None = None,
        hyperparameters: dict[str, Any] | None = None,
        closing: int | None = None,
    ) -> None:
        given = {
            "datasets": datasets,
            "languages": languages,
            "license": license,
            "example": example,
            "limits": limits,
            "base": base,
            "hyperparameters": hyperparameters,
            "closing": closing,
        }
        self.given = {k: v for k, v in given.items() if v is not None}
        self.facts: RunFacts | None = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the facts, on the first rank of all, and leave them on the model, for whoever pushes that."""
        self._tell(args, state, kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is measured after training."""
        if any(ends_training(entry) for entry in state.log_history):
            self._tell(args, state, kwargs)

    def _tell(self, args: TrainingArguments, state: TrainerState, known: dict[str, Any]) -> None:
        model = extract_model_from_parallel(known["model"], keep_torch_compile=False)
        if not state.is_world_process_zero or not isinstance(model, PTunePreTrainedModel):
            return
        self.facts = model.__dict__[RUN] = gather_facts(
            args, state, model, _split_of(getattr(known.get("eval_dataloader"), "dataset", None)) | self.given
        )
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        self.facts.save(args.output_dir)


def gather_facts(
    args: TrainingArguments,
    state: TrainerState,
    model: PTunePreTrainedModel,
    given: dict[str, Any] | None = None,
) -> RunFacts:
    """What Trainer, model and callbacks know of a run.

    Args:
        args: of the Trainer.
        state: of the Trainer.
        model: the wrapped model.
        given: fields of `RunFacts` that only the user knows.
    """
    facts = model_facts(model)
    for name, value in (given or {}).items():
        setattr(facts, name, value)
    facts.datasets = [Path(d).name if Path(d).exists() else public_name(d) for d in facts.datasets]
    facts.base = facts.base and public_name(facts.base)
    unset = {f.name: getattr(f.default, "value", f.default) for f in fields(TrainingArguments)}
    chosen = {n: getattr(args, n) for n in _HYPERPARAMETERS}
    chosen = {n: getattr(v, "value", v) for n, v in chosen.items()}
    if args.auto_find_batch_size and state.train_batch_size:
        chosen["per_device_train_batch_size"] = state.train_batch_size // max(1, args.n_gpu)  # what was found
    # max_steps, where it is set, decides alone how long a training is
    length, unread = ("max_steps", "num_train_epochs") if args.max_steps > 0 else ("num_train_epochs", "max_steps")
    del chosen[unread]
    always = ("learning_rate", length, "per_device_train_batch_size")
    # what is off may be False, 0 or None, and is left out only where the Trainer has it off unasked
    chosen = {k: v for k, v in chosen.items() if k in always or (v or 0) != (unset[k] or 0)}
    facts.hyperparameters = chosen | facts.hyperparameters  # which are those that were given
    facts.seeds = [args.seed]
    facts.history = [
        {
            k: v
            for k, v in entry.items()
            if isinstance(v, (int, float)) and not k.startswith("mem_") and not k.endswith("preparation_time")
        }
        for entry in state.log_history
    ]
    step, afterwards = _kept(args, state, facts.history)
    then: dict[str, float] = next((e for e in facts.history if e.get("step") == step), {})
    for entry in afterwards:  # the Trainer logs it at the last step
        entry |= {name: then[name] for name in ("step", "epoch") if name in then}
    if metrics := _measured(step, afterwards, facts.history):
        facts.metrics = [metrics]
    for entry in state.log_history:
        for key, value in entry.items():
            if found := _MEMORY.fullmatch(key):
                kept = facts.memory_by_rank.setdefault(found[2], {}) if found[2] else facts.memory
                kept[found[1]] = max(kept.get(found[1], 0.0), value)
            elif key in _SPEED:
                facts.speed[key] = value  # the last log of a training is about all of it
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine() + " CPU"
    facts.hardware = {"device": device, "processes": args.world_size, "engine": engine_name()}
    facts.versions = {"hf_ptune": hf_ptune.__version__} | {name: _version(name) for name in _LIBRARIES}
    return facts


def _kept(
    args: TrainingArguments, state: TrainerState, history: list[dict[str, float]]
) -> tuple[int | None, list[dict[str, float]]]:
    """The step of the model that is there now, and what was measured of it after training, if that is the best one."""
    ends = [n for n, entry in enumerate(history) if ends_training(entry)]
    if not ends or not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return state.global_step, []
    number = Path(state.best_model_checkpoint).name.rpartition("-")[2]
    return int(number) if number.isdigit() else state.best_global_step, history[ends[-1] + 1 :]


def _measured(
    step: int | None, afterwards: list[dict[str, float]], history: list[dict[str, float]]
) -> dict[str, float]:
    """What was measured of the model that is there now, on all datasets: none of another step, nor of a fresh one."""
    found: dict[str, float] = {}
    for prefix, dropped in (("eval_", "eval_"), (TEST, "")):
        rows = [_named(e, prefix) for e in afterwards]
        if not any(rows):
            rows = [_named(e, prefix) for e in history if e.get("step") == step]
        found |= {k.removeprefix(dropped): v for row in rows for k, v in row.items()}
    return {k: v for k, v in found.items() if not k.endswith((*TIMES, "epoch", "flos"))}


def _named(entry: dict[str, float], prefix: str) -> dict[str, float]:
    return {k: v for k, v in entry.items() if k.startswith(prefix)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _split_of(rows: Any) -> dict[str, Any]:
    """Which split the rows that were evaluated on are, as a field of `RunFacts`; none where they do not tell."""
    split = getattr(rows, "split", None)
    return {} if split is None or callable(split) else {"split": str(split)}


def _told(arguments: dict[str, Any], repo_id: str) -> dict[str, Any]:
    """What the arguments of the Trainer's own card say of a run, as fields of `RunFacts`."""

    def listed(name: str) -> list[str]:
        value = arguments.get(name) or []
        return [value] if isinstance(value, str) else list(value)

    title = arguments.get("model_name")  # which a push fills in with the repository's
    base: Any = arguments.get("finetuned_from")
    found = {
        "languages": listed("language"),
        "license": arguments.get("license"),
        "tags": listed("tags"),
        "datasets": listed("dataset") or listed("dataset_name") or listed("dataset_tags"),
        "dataset_ids": listed("dataset_tags"),
        "dataset_args": listed("dataset_args"),
        "base": base if is_hub_id(base) and not Path(base).exists() else None,
        "name": None if title == repo_id.split("/")[-1] else title,
    }
    return {k: v for k, v in found.items() if v}


@contextmanager
def _marked(trainer: Any, mark: str) -> Iterator[None]:
    vars(trainer)[mark] = True
    try:
        yield
    finally:
        vars(trainer).pop(mark, None)


@replaces(Trainer, "create_model_card", only_split=False)
def _create_model_card(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """Let the Trainer finish a folder of ours in our way, and every other one in its own.

    A push flattens the adapter, unless it is given `keep_encoder=True`; a card alone leaves it as it trains.
    """
    keep_encoder = kwargs.pop("keep_encoder", _PUSH not in vars(trainer))
    if not trainer.is_world_process_zero() or _CHECKPOINT in vars(trainer):
        return
    model: Any = ours(trainer.model)
    # the Trainer has just gathered it into that file, and calls this rank alone
    tensors = read_tensors(Path(trainer.args.output_dir) / WEIGHTS_NAME) if splits(trainer) else None
    given = next((c.given for c in trainer.callback_handler.callbacks if isinstance(c, ModelCardCallback)), {})
    repo_id = trainer.hub_model_id or Path(trainer.args.output_dir).name
    told = _told(inspect.signature(original).bind(*args, **kwargs).arguments, repo_id)
    if tags := [*told.get("tags", ()), *getattr(trainer, "_tag_names", ())]:
        told["tags"] = list(dict.fromkeys(tags))
    named: Any = given.get("datasets") or []
    if any("/" in name and is_hub_id(name) for name in map(public_name, named)):
        told = {k: v for k, v in told.items() if k not in ("dataset_ids", "dataset_args")}
    # scripts name what they loaded, which may be an adapter
    if is_hub_id(model_facts(model).base) or told.get("base") == model.name_or_path:
        told.pop("base", None)
    facts = gather_facts(trainer.args, trainer.state, model, _split_of(trainer.eval_dataset) | told | given)
    inherit_license(facts, trainer.args.hub_token)
    model.__dict__[RUN] = facts
    folder = Path(trainer.args.output_dir)
    finish_folder(model, folder, repo_id, keep_encoder=keep_encoder, facts=facts, state_dict=tensors)


@replaces(Trainer, "push_to_hub", only_split=False)
def _push_to_hub(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the card of a push know that it is of one."""
    with _marked(trainer, _PUSH):
        return original(*args, **kwargs)


def _save_checkpoint(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """Save without a card: the folder around the checkpoints is finished when training is."""
    with _marked(trainer, _CHECKPOINT):
        original(*args, **kwargs)


@replaces(Trainer, "create_accelerator_and_postprocess", only_split=False)
def _take_over_cards(trainer: Any, original: Any) -> None:
    """Let our card stand where TRL's trainers write one of their own, which tells of no method."""
    original()
    for kind in (k for k in type(trainer).__mro__ if k.__module__.partition(".")[0] == "trl"):
        for name, function in (("create_model_card", _create_model_card), ("_save_checkpoint", _save_checkpoint)):
            if name in vars(kind):
                replaces(kind, name, only_split=False)(function)
