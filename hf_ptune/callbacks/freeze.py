"""Freeze the backbone before the optimizer exists, and unfreeze chosen modules on a schedule."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_ptune import patching
from hf_ptune.backbone import adapter_names
from hf_ptune.engines import replaces
from hf_ptune.errors import PTuneError
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.multitask import MultiTaskPrompt

_BACKBONE = "backbone."
_QUANTIZERS = ("bitsandbytes", "torchao", "optimum")
# these replace the parameters that an optimizer holds by shards or flat copies, so identity says nothing
SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
_held: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()


def held_back(model: nn.Module) -> set[str]:
    """Names of the adapter's parameters whose training a schedule has not started yet."""
    return set(_held.get(model, ()))


def unwrap_ptune_model(
    model: Any, caller: str, error: type[PTuneError] = PTuneError
) -> PTunePreTrainedModel | MultiTaskPrompt:
    """Take a model, of one task or of several, out of its distributed containers.

    Args:
        model: what the Trainer passes to its callbacks.
        caller: name of the callback, for the message.
        error: what to raise.

    Raises:
        PTuneError: the model carries no prompt.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False) if isinstance(model, nn.Module) else model
    if not isinstance(inner, (PTunePreTrainedModel, MultiTaskPrompt)):
        raise error(
            f"{caller} found {type(inner).__name__}, expected a model with a prompt. "
            "Wrap it before the Trainer is made: model = get_ptune_model(model, PTuneConfig(...))."
        )
    return inner


def some(names: Iterable[str], limit: int = 5) -> str:
    """List names for a message, shortened."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _why_untrainable(parameter: nn.Parameter, fp16: bool) -> str | None:
    if parameter.device.type == "meta":
        return "it has no data (meta device); load the model with its weights"
    if type(parameter).__module__.split(".")[0] in _QUANTIZERS:
        return f"it is quantised ({type(parameter).__name__}); load the backbone unquantised"
    if not parameter.dtype.is_floating_point:
        return f"it holds {parameter.dtype}, which has no gradient; leave it frozen"
    if parameter.dtype.itemsize < 2:
        return f"it holds {parameter.dtype}, too coarse for an update; load it in bfloat16 or float32"
    if fp16 and parameter.dtype is torch.float16:
        return "it holds float16 while fp16=True unscales float32 gradients only; load it in float32"
    return None


class FreezeBackboneCallback(TrainerCallback):
    """Freeze everything but the adapter before the optimizer exists; unfreeze modules on a schedule.

    With `train_backbone` the backbone is part of the adapter, and stays trainable. Of several tasks, the prompt and
    all heads train; their base has no schedule.

    Modules of the schedule become part of the adapter (`modules_to_save`), so that they are saved and
    counted. The optimizer holds them from the start, with the learning rate and weight decay that the
    Trainer gives them; they have no gradient, and so no update and no decay, until they are due. So
    checkpoints of the optimizer have one layout, and DistributedDataParallel reduces their gradients.

    Args:
        unfreeze_schedule: when to unfreeze what. A key is a count of optimizer steps (int, 0 or more) or of
            epochs (float, 0 or more, fractions allowed); a value lists shell patterns over the names of
            `model.named_parameters()`, e.g. `"backbone.*.layers.11.*"`. The module that owns a matched
            parameter is unfrozen as a whole.

    Raises:
        PTuneError: a key that is neither step nor epoch, or a value that is not a list.
    """

    def __init__(self, unfreeze_schedule: Mapping[float, Sequence[str]] | None = None) -> None:
        self.unfreeze_schedule: dict[float, list[str]] = {}
        for when, patterns in (unfreeze_schedule or {}).items():
            if isinstance(when, bool) or not isinstance(when, int | float) or not 0 <= when < float("inf"):
                raise PTuneError(f"unfreeze_schedule has the key {when!r}; expected a step (int) or epoch (float).")
            if isinstance(patterns, str):
                raise PTuneError(f"unfreeze_schedule[{when!r}] is the string {patterns!r}; expected a list of names.")
            self.unfreeze_schedule[when] = list(patterns)
        self._names: dict[float, set[str]] = {}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Freeze the backbone and make the schedule's modules part of the adapter.

        Raises:
            PTuneError: no prompt, a pattern that selects nothing, a parameter that cannot train, or a schedule for
                several tasks.
        """
        model = unwrap_ptune_model(kwargs.get("model"), type(self).__name__)
        self.plan(args, model)
        self._refuse_untrainable(model, model.adapter_parameter_names(), args.fp16)
        model.freeze_backbone()

    def plan(self, args: TrainingArguments, model: PTunePreTrainedModel | MultiTaskPrompt) -> None:
        """Make the schedule's modules part of the adapter, so that checkpoint and optimizer to come hold them.

        Args:
            args: of the Trainer.
            model: about to train; without an optimizer yet.

        Raises:
            PTuneError: a pattern that selects nothing, a parameter that cannot train, or several tasks.
        """
        if self.unfreeze_schedule:
            model = self._of_one_task(model)
            self._refuse_missing_reduction(args, model)
            self._names = self._chosen(model, args.fp16)
            self._set_requires_grad(model, set().union(*self._names.values()), True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the optimizer holds exactly what trains, then hold back what is not due.

        Raises:
            PTuneError: the schedule came too late, the trainable parameters are not the adapter's, or the optimizer
                holds others.
        """
        model = unwrap_ptune_model(kwargs.get("model"), type(self).__name__)
        scheduled = set().union(*self._names.values())
        if self.unfreeze_schedule:
            self._of_one_task(model)
        if set(self._names) != set(self.unfreeze_schedule) or not scheduled <= model.adapter_parameter_names():
            raise PTuneError(
                "unfreeze_schedule came when the optimizer had been made, expected it before. Pass the callback in "
                "Trainer(callbacks=[...]), or by trainer.add_callback before trainer.train."
            )
        self._set_requires_grad(model, _held.pop(model, set()), True)
        self._check_trainable(model)
        if args.distributed_state is None or args.distributed_state.distributed_type not in SHARDING:
            self._check_optimizer(model, kwargs.get("optimizer"))
        if scheduled:
            _held[model] = scheduled
            self._set_requires_grad(model, scheduled, False)
            self._release(model, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze what has become due."""
        if self._names:
            self._release(unwrap_ptune_model(kwargs.get("model"), type(self).__name__), state)

    def _of_one_task(self, model: PTunePreTrainedModel | MultiTaskPrompt) -> PTunePreTrainedModel:
        if isinstance(model, MultiTaskPrompt):
            raise PTuneError(
                "unfreeze_schedule: tasks share a base that is frozen; leave it out, or train one task by itself."
            )
        return model

    def _chosen(self, model: PTunePreTrainedModel, fp16: bool) -> dict[float, set[str]]:
        """Names per key of the schedule; also adds their modules to `modules_to_save`."""
        config = model.config
        everything = {name for name, _ in model.named_parameters()}
        core = {n for n in everything if not n.startswith(_BACKBONE)}
        core |= {
            _BACKBONE + n for n in adapter_names(model.backbone, config.method, model.task, whole=config.train_backbone)
        }
        plan: dict[float, set[str]] = {}
        modules: list[str] = []
        for when, patterns in self.unfreeze_schedule.items():
            owners: list[str] = []
            for pattern in patterns:
                chosen = self._matches(pattern, everything, core)
                self._refuse_untrainable(model, chosen, fp16)
                owners += [n.removeprefix(_BACKBONE).rpartition(".")[0] for n in chosen]
            owners = [m for m in sorted(set(owners)) if m not in modules]
            modules += owners
            wanted = adapter_names(model.backbone, config.method, model.task, owners)
            earlier = set().union(*plan.values())
            plan[when] = {_BACKBONE + n for n in wanted} - core - earlier
        kept = config.modules_to_save or []
        config.modules_to_save = kept + [m for m in modules if m not in kept]
        unsaved = set().union(*plan.values()) - model.adapter_parameter_names()
        if unsaved:
            raise PTuneError(
                f"{some(unsaved)} would be trained but not saved. Name the modules in "
                f"PTuneConfig(modules_to_save={config.modules_to_save}) before the model is made."
            )
        return plan

    def _matches(self, pattern: str, everything: set[str], core: set[str]) -> set[str]:
        found = {n for n in everything if fnmatchcase(n, pattern)}
        if not found:
            raise PTuneError(
                f"the pattern {pattern!r} of unfreeze_schedule matches no parameter. Names look like "
                f"{some(everything - core, 3)}; see model.named_parameters()."
            )
        if not found - core:
            raise PTuneError(
                f"the pattern {pattern!r} of unfreeze_schedule matches {some(found, 3)} only, which the "
                "adapter trains from the first step. Remove it, or name parameters of the backbone."
            )
        return found - core

    def _refuse_untrainable(self, model: nn.Module, names: set[str], fp16: bool) -> None:
        for name, parameter in model.named_parameters():
            why = _why_untrainable(parameter, fp16) if name in names else None
            if why is not None:
                raise PTuneError(f"{name} cannot be trained: {why}.")

    def _refuse_missing_reduction(self, args: TrainingArguments, model: PTunePreTrainedModel) -> None:
        if args.parallel_mode != ParallelMode.DISTRIBUTED:
            return
        find_unused = args.ddp_find_unused_parameters
        if find_unused is None:
            find_unused = not (args.gradient_checkpointing or model.is_gradient_checkpointing)
        if not find_unused:
            raise PTuneError(
                "unfreeze_schedule holds parameters back, and DistributedDataParallel would wait for their "
                "gradients. Set ddp_find_unused_parameters=True (with gradient checkpointing: not reentrant)."
            )

    def _check_trainable(self, model: PTunePreTrainedModel | MultiTaskPrompt) -> None:
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        expected = model.adapter_parameter_names()
        if trainable != expected:
            raise PTuneError(
                f"trainable are {len(trainable)} parameters, expected the adapter's {len(expected)}: "
                f"not trained [{some(expected - trainable)}], trained also [{some(trainable - expected)}]. "
                "Pass FreezeBackboneCallback in Trainer(callbacks=[...]), which freezes in time, and leave "
                "requires_grad alone afterwards."
            )

    def _check_optimizer(self, model: nn.Module, optimizer: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trainable = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        missing = {name for key, name in trainable.items() if key not in held}
        others = {n for n, p in model.named_parameters() if id(p) in held and not p.requires_grad}
        strangers = len(held - {id(p) for p in model.parameters()})
        if missing or others or strangers:
            raise PTuneError(
                f"the optimizer does not hold exactly what trains: missing [{some(missing)}], frozen "
                f"[{some(others)}], {strangers} tensors that are not the model's. Let the Trainer make "
                "it, or make it from [p for p in model.parameters() if p.requires_grad] after the Trainer."
            )

    def _release(self, model: nn.Module, state: TrainerState) -> None:
        waiting = _held.get(model, set())
        for when, names in self._names.items():
            reached = state.global_step >= when if isinstance(when, int) else state.epoch >= when
            if reached and names & waiting:
                self._set_requires_grad(model, names, True)
                waiting -= names

    def _set_requires_grad(self, model: nn.Module, names: set[str], value: bool) -> None:
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.requires_grad_(value)


@replaces(Trainer, "add_callback", only_split=False)
def _add_callback(trainer: Any, original: Any, callback: Any) -> None:
    """Let a callback that joins a Trainer plan its schedule, as those that were there from the start have done."""
    original(callback)
    added = trainer.callback_handler.callbacks[-1]
    if isinstance(added, FreezeBackboneCallback):
        added.plan(trainer.args, unwrap_ptune_model(trainer.model, type(added).__name__))


@patching.replaces(Trainer, "call_model_init")
def _call_model_init(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Let callbacks freeze and plan the model that each training of `model_init` starts from.

    A search for hyperparameters has let go of the model before, so that nothing tells whose Trainer it is.
    """
    model = original(*args, **kwargs)
    handler = vars(trainer).get("callback_handler")  # none yet while the Trainer is made
    for callback in () if handler is None else handler.callbacks:
        if isinstance(callback, FreezeBackboneCallback):
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    return model
