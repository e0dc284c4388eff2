"""The Trainer on accelerate's engines: one kind of checkpoint, the adapter's, whatever the engine and the world size.

Where an engine splits parameters (FSDP2, ZeRO-2 and ZeRO-3), adapter and optimizer state are gathered and written by
one rank as a single process would write them, and each rank takes its part when they are read. The Trainer's own way
would write the frozen base with every checkpoint, in a form that only the same engine on as many ranks can read.
Importing this module lets the Trainer come here for models of ours; others do not meet it.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as trainer_module
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from hf_ptune import patching
from hf_ptune.adapter_file import WEIGHTS_NAME, read_tensors
from hf_ptune.backbone import check_target
from hf_ptune.errors import PTuneError
from hf_ptune.facts import RUN
from hf_ptune.methods import get_method
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.resuming import check_checkpoint
from hf_ptune.sharding import read_master, scatter, write_master

logger = logging.get_logger(__name__)
TRAINED = "_ptune_trained"  # on a wrapped model: steps that it has been trained for in this process


def ours(model: Any) -> PTunePreTrainedModel | None:
    """The wrapped model inside a Trainer's, if it is one of ours."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False) if model is not None else None
    return inner if isinstance(inner, PTunePreTrainedModel) else None


def splits(trainer: Trainer) -> bool:
    """Whether the engine splits parameters or optimizer state over ranks."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def engine_name() -> str:
    """What runs the processes of this run: one process, DDP, FSDP2, or DeepSpeed with its stage."""
    # read, not made: making another one lets accelerate forget that it runs FSDP2
    state: dict[str, Any] = AcceleratorState._shared_state
    if not state or (state["num_processes"] == 1 and not state.get("deepspeed_plugins")):
        return "one process"
    if state.get("deepspeed_plugins"):
        plugins = state["deepspeed_plugins"]
        plugin = next(iter(plugins.values())) if isinstance(plugins, dict) else plugins
        return f"DeepSpeed ZeRO-{plugin.zero_stage}"
    if state.get("fsdp_plugin"):
        return f"FSDP{state['fsdp_plugin'].fsdp_version}"
    return "DDP"


def is_whole(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state, which is written last, can be read."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The last whole checkpoint of a run; one that a killed run has left unfinished is passed over.

    Args:
        folder: the run's output folder.
    """
    if not Path(folder).is_dir():
        return None
    for checkpoint in reversed(sort_checkpoints(os.fspath(folder))):
        if is_whole(checkpoint):
            return str(checkpoint)
        logger.warning(f"{checkpoint} was not finished; the one before it is taken.")
    return None


def at_end(trainer: Trainer) -> bool:
    """Whether a run has no step left, which ends its training; the Trainer looks after a step only."""
    finished: bool = trainer.state.global_step >= trainer.state.max_steps
    trainer.control.should_training_stop |= finished
    return finished


def gather_optimizer(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's state as a single process has it; all ranks have to come.

    Args:
        trainer: in training, on an engine that splits.

    Returns:
        What `torch.optim.Optimizer.state_dict` gives.
    """
    if trainer.is_fsdp_enabled:
        found: dict[str, Any] = trainer.optimizer.state_dict()
        state = {n: {k: _full(v) for k, v in s.items()} for n, s in found["state"].items()}
        return {"state": state, "param_groups": found["param_groups"]}
    zero = _zero(trainer)
    base = zero.optimizer
    _link(zero)
    state, numbered, groups = {}, 0, []
    for group, parameters in zip(base.param_groups, _groups(trainer), strict=True):
        numbers = range(numbered, numbered := numbered + len(parameters))
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": list(numbers)})
        for number, parameter in zip(numbers, parameters, strict=True):
            kept = _state_of(trainer)
            if kept:
                state[number] = {
                    k: read_master(parameter, k).cpu().clone() if _is_split(v) else _copy(v) for k, v in kept.items()
                }
    return {"state": state, "param_groups": groups}


def scatter_optimizer(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Give every rank its part of an optimizer's state.

    Args:
        trainer: about to train, on an engine that splits.
        saved: what `gather_optimizer` gave, or a single process saved.
    """
    if trainer.is_fsdp_enabled:
        optimizer: Any = trainer.optimizer.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {n: {k: _like(v, parameters[n]) for k, v in s.items()} for n, s in saved["state"].items()}
        optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        return
    zero = _zero(trainer)
    first: dict[str, Any] = next(iter(saved["state"].values()), {})
    for flat in _flats(trainer):
        zero.optimizer.state[flat] = {
            k: torch.zeros_like(flat) if _is_split(v) else _copy(v) for k, v in first.items() if flat.numel()
        }
    _link(zero)
    numbered = 0
    for group, kept, parameters in zip(
        zero.optimizer.param_groups, saved["param_groups"], _groups(trainer), strict=True
    ):
        group.update({k: v for k, v in kept.items() if k != "params"})
        for parameter in parameters:
            for key, value in saved["state"].get(numbered, {}).items():
                if _is_split(value):
                    write_master(parameter, value, key)
            numbered += 1


def _full(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _like(value: Any, parameter: Any) -> Any:
    if not _is_split(value) or not isinstance(parameter, DTensor):
        return value
    local = scatter(value, parameter)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _is_split(value: Any) -> bool:
    """Moments are split as the parameters are; the count of steps is not."""
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _zero(trainer: Trainer) -> Any:
    return trainer.deepspeed.optimizer


def _link(zero: Any) -> None:
    """Let ZeRO-2 find its moments: it looks once, after the first group's first step, when others have none yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _flats(trainer: Trainer) -> list[Tensor]:
    """The flat parts that DeepSpeed's optimizer really trains on this rank."""
    zero = _zero(trainer)
    flats: list[Tensor] | None = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(zero.single_partition_of_fp32_groups if flats is None else flats)


def _groups(trainer: Trainer) -> list[list[Tensor]]:
    """The parameters of every group of the optimizer, in the order in which a single process numbers them."""
    model = ours(trainer.model)
    assert model is not None
    named = dict(model.named_parameters())
    names: list[list[str]] = vars(trainer).get("_ptune_groups") or [[n for n, p in named.items() if p.requires_grad]]
    return [[named[n] for n in group] for group in names]


def _state_of(trainer: Trainer) -> dict[str, Any]:
    """What the optimizer keeps, of any of its parts: keys and counts are the same for all."""
    states = _zero(trainer).optimizer.state
    return next((states[f] for f in _flats(trainer) if f.numel() and states.get(f)), {})


def replaces(where: Any, name: str, only_split: bool = True) -> Callable[[Any], Any]:
    """Let the Trainer call a function here in place of its own, for models of ours.

    Args:
        where: the Trainer's class.
        name: of its method; the function takes it, bound to the Trainer, as second argument.
        only_split: leave the Trainer alone on engines that keep parameters whole.
    """

    def when(trainer: Any) -> bool:
        return ours(getattr(trainer, "model", None)) is not None and (not only_split or splits(trainer))

    return patching.replaces(where, name, when)


@replaces(Trainer, "create_accelerator_and_postprocess", only_split=False)
def _create_accelerator(trainer: Any, original: Any) -> None:
    """Let DistributedDataParallel not look at buffers, which do not change, and any engine find its best.

    The Trainer refuses `save_only_model` together with `load_best_model_at_end` on engines whose checkpoints are not
    the model's; ours are.
    """
    args = trainer.args
    alone, args.save_only_model = args.save_only_model, False
    try:
        original()
    finally:
        args.save_only_model = alone
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise PTuneError(
            "FSDP1 flattens trained and frozen parameters together. Set fsdp_version: 2 in the launch configuration, "
            "as in recipes/accelerate/fsdp2.yaml."
        )
    handler = trainer.accelerator.ddp_handler
    if handler is not None and args.ddp_broadcast_buffers is None:
        handler.broadcast_buffers = False


@replaces(Trainer, "create_optimizer", only_split=False)
def _create_optimizer(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Note which parameters are in which group, before an engine replaces them by parts."""
    optimizer = original(*args, **kwargs)
    if trainer.is_deepspeed_enabled:
        names = {id(p): n for n, p in trainer.model.named_parameters()}
        trainer._ptune_groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    return optimizer


@replaces(Trainer, "train", only_split=False)
def _train(trainer: Any, original: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Resume from whole checkpoints of such an adapter only, and let DDP not look for unused parameters.

    A prompt is used in every step; what a callback has made part of the adapter by now may not be.
    """
    config, handler = trainer.model.config, trainer.accelerator.ddp_handler
    check_target(trainer.args.output_dir, config.base_model_name_or_path)
    vars(ours(trainer.model)).pop(RUN, None)  # those of a training before
    prompt_alone = get_method(config.method).kind is not None and not (config.modules_to_save or config.train_backbone)
    if handler is not None and trainer.args.ddp_find_unused_parameters is None and prompt_alone:
        handler.find_unused_parameters = False
    if resume_from_checkpoint is True:
        resume_from_checkpoint = last_checkpoint(trainer.args.output_dir) or True
    elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
        other = last_checkpoint(Path(resume_from_checkpoint).parent)
        raise PTuneError(
            f"{resume_from_checkpoint} is no whole checkpoint: its {TRAINER_STATE_NAME}, which is written last, cannot "
            "be read. " + (f"Resume from {other}." if other else "Start anew.")
        )
    if isinstance(resume_from_checkpoint, (str, os.PathLike)):
        check_checkpoint(ours(trainer.model), os.fspath(resume_from_checkpoint), of_a_recipe=False)
    return original(resume_from_checkpoint, *args, **kwargs)


@contextmanager
def counting_steps(trainer: Trainer, models: Sequence[Any]) -> Iterator[None]:
    """Note on wrapped models the steps that a Trainer takes meanwhile."""
    before = trainer.state.global_step
    yield
    for model in models:
        marks = vars(model)
        marks[TRAINED] = marks.get(TRAINED, 0) + trainer.state.global_step - before


@replaces(Trainer, "_run_epoch", only_split=False)
def _run_epoch(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """Train no further where a checkpoint is at the end already; count how far the prompt is from a fresh start."""
    if not at_end(trainer):
        with counting_steps(trainer, [ours(trainer.model)]):
            original(*args, **kwargs)


@replaces(Trainer, "evaluation_loop", only_split=False)
def _evaluate(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Count each sample once; Seq2SeqTrainer keeps those that were repeated to give all ranks as many."""
    trainer.gather_function = functools.partial(
        trainer.accelerator.gather_for_metrics, use_gather_object=trainer.args.eval_use_gather_object
    )
    return original(*args, **kwargs)


@replaces(Trainer, "save_model")
def _save_model(trainer: Any, original: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """Gather the adapter alone; one rank writes it."""
    model = ours(trainer.model)
    assert model is not None
    folder = trainer.args.output_dir if output_dir is None else output_dir
    trainer._save(folder, state_dict=model.adapter_state_dict())
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


@replaces(Trainer, "_save_optimizer_and_scheduler")
def _save_optimizer(trainer: Any, original: Any, output_dir: str) -> None:
    """Gather the optimizer's state; one rank writes it."""
    state = gather_optimizer(trainer)
    if trainer.args.should_save:
        torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))


@replaces(Trainer, "_save_rng_state", only_split=False)
def _save_rng_state(trainer: Any, original: Any, output_dir: str) -> None:
    """Wait for all ranks' files, so that the Trainer's state, which comes next, is the last to be written."""
    original(output_dir)
    trainer.accelerator.wait_for_everyone()


@replaces(Trainer, "_load_from_checkpoint")
def _load(trainer: Any, original: Any, resume_from_checkpoint: str, model: Any = None) -> None:
    """Let every rank take its part of an adapter."""
    load_adapter(trainer.model if model is None else model, resume_from_checkpoint)


@replaces(Trainer, "_load_best_model")
def _load_best(trainer: Any, original: Any) -> None:
    """Let every rank take its part of the best adapter."""
    trainer.accelerator.wait_for_everyone()
    load_adapter(trainer.model, trainer.state.best_model_checkpoint)


@replaces(Trainer, "_issue_warnings_after_load", only_split=False)
def _warn_of_keys(trainer: Any, original: Any, load_result: Any) -> None:
    """Leave out what no checkpoint holds: the base."""
    model = ours(trainer.model)
    assert model is not None
    kept = set(model.adapter_state_dict())
    missing = [n for n in load_result.missing_keys if n in kept]
    original(type(load_result)(missing, load_result.unexpected_keys))


@replaces(Trainer, "_load_optimizer_and_scheduler")
def _load_optimizer(trainer: Any, original: Any, checkpoint: str | None) -> None:
    """Let every rank take its part of an optimizer's state; without one, as after `save_only_model`, it starts anew."""
    if checkpoint is None:
        return
    paths = [Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
    if all(path.is_file() for path in paths):
        saved, schedule = (torch.load(path, map_location="cpu", weights_only=True) for path in paths)
        scatter_optimizer(trainer, saved)
        trainer.lr_scheduler.load_state_dict(schedule)


def load_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Read an adapter's tensors into a model that an engine may hold in parts; all ranks have to come.

    Args:
        model: the wrapped model, in whatever container.
        folder: a checkpoint.
    """
    inner = ours(model)
    assert inner is not None
    inner.load_adapter_state_dict(read_tensors(Path(folder) / WEIGHTS_NAME))


@patching.replaces(trainer_module, "deepspeed_load_checkpoint", when=lambda engine: ours(engine) is not None)
def _load_deepspeed(engine: Any, original: Any, checkpoint_path: str, load_module_strict: bool = True) -> None:
    """Let every rank take its part of an adapter."""
    load_adapter(engine, checkpoint_path)
