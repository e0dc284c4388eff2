"""Watch whether a run learns, and say once what is wrong and what to change."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_ptune.adapter_file import is_fresh
from hf_ptune.backbone import head_names
from hf_ptune.callbacks.freeze import SHARDING, unwrap_ptune_model
from hf_ptune.callbacks.numbers import NumbersCallback
from hf_ptune.callbacks.trend import Losses, Trend, common_trend
from hf_ptune.cards import ends_training
from hf_ptune.defaults import defaults_of
from hf_ptune.engines import TRAINED
from hf_ptune.facts import SOURCE
from hf_ptune.modeling_ptune import PTunePreTrainedModel

logger = logging.get_logger(__name__)
_LOOKS = 20  # times that a run is looked at, where its own logs are rarer
_LEAST_STEPS = 20  # after warm-up; fewer say nothing
_FEWEST_STEPS = 5  # after which a short run may be judged at its end
# P-Tuning v2 on MiniLM, after 20 of 80 steps: 0.0014 at learning rate 2e-4, whose loss fell by 3 % in all; 0.007 at
# 1e-3, which learnt slowly; 0.11 at 2e-2, which learnt well
_LEAST_CHANGE = 3e-3
_RISE, _CERTAIN_RISE, _GAIN, _CLEAR_GAIN = 0.2, 0.5, 0.02, 0.1  # of the first losses
# a prompt so many times its own length from its start makes the noise of the losses itself; with a rate far above the
# usual one sooner: on MiniLM at 50 times, after losses of .69, .82 and 3.76, it was 8 lengths away
_LOST, _ASTRAY = 10.0, 1.0
_SMALL_CHANGE = 0.05  # below it, a flat loss is the learning rate's fault: prompts that learnt changed by more
_FAR = 10.0  # a rate so many times the usual one is not too low, however little a loss falls
_ERRORS, _RISE_ERRORS = 3.0, 4.0  # standard errors that a fall and a rise of losses have to be beyond
# optimizers whose steps are of another size than Adam's at the same rate, so that no usual rate is known for them
_OF_OTHER_RATES = ("sgd", "lbfgs", "adadelta", "adagrad", "rprop", "lion", "lomo", "muon")
TASK_LOSS = "loss_"  # and a task's name: mean over its own steps since the last log


class LearningCallback(NumbersCallback):
    """Report a learning rate that is too high or too low, a prompt that never moves, and a loss that stays flat.

    Every training log gets `prompt_change`, the distance of the encoded prompt from its start relative to the start
    (its root mean square where it starts at zero; BitFit: of the bias terms). The log that ends training gets
    `learning_too_high`, `learning_too_low` and `learning_flat`: the step at which each was found, where it was.
    A run that logs less often than twenty times is logged twenty times, and at its first step.

    Found are, each once, as a warning on the first rank with what was measured and the cure: `too_high`: loss or prompt
    is not finite; or, after a quarter of the run and where the prompt has moved, the latest quarter of the losses lies
    above those until the second log by a fifth, or above the first step's by half, either by four standard errors; or
    by half alone, where the prompt has gone ten times its own length, which is noise of its own, or once at ten times
    the usual rate and the losses lie above chance by half too. `too_low`: after a quarter of the run, and 20 steps
    after warm-up, the prompt has changed by less than 0.3 %. `flat`: after half of the run, the latest quarter of the
    losses lies neither below the first step's nor below the first quarter's, by 2 % and three standard errors, nor by
    10 % whatever the error; losses of classes that have come down to chance have not fallen by that; it is dropped
    where the loss has fallen by the end. Runs of fewer steps are judged at their end, where they are clear: a loss that
    rose by half, a prompt that changed by less than 0.03 %. A run that goes on from a checkpoint beyond its first tenth
    is judged by `too_high` alone: what had been learnt before is not known. So is one whose prompt is no fresh start:
    it comes from a saved adapter, or has been trained for 20 steps before in this process, unless it was found not to
    learn there.

    Losses of several tasks are judged by the mean of what each is beside its own first ones: `loss_<task>` in the logs,
    as `MultiTaskTrainer` writes them. Without those, a model of several tasks is judged by its prompt alone. Steps
    without a label, whose loss is 0, do not count. Where DeepSpeed runs the model, a run is judged by its losses
    alone: the prompt is not watched, so that there is no `prompt_change` and no `too_low`.

    Args:
        usual: the learning rate that cures lead to under optimizers whose steps are like Adam's; under others there is
            none, so that rates are only told apart by tens. Unset: what the model's method starts with on its task.

    Attributes:
        found: name of a finding to its message.
        summary: after training: `prompt_change`, and the step of each finding.
    """

    def __init__(self, usual: float | None = None) -> None:
        self.usual = usual
        self.found: dict[str, str] = {}
        self.summary: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        self.found.clear()
        self.summary = {}
        self._latest = 0.0
        self._losses: dict[str, Losses] = {}  # by task; of a single one by ""
        self._rate = 0.0
        self._start: Tensor | None = None
        self._late = False
        self._like_adam = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the start.

        Raises:
            PTuneError: the model carries no prompt.
        """
        self._begin()
        model = unwrap_ptune_model(kwargs.get("model"), type(self).__name__)
        self._late = state.global_step > state.max_steps / 10 or _goes_on(model)
        optimizer = kwargs.get("optimizer")
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__.lower()
        self._like_adam = not any(name in kind for name in _OF_OTHER_RATES)
        if args.distributed_state is not None and args.distributed_state.distributed_type in SHARDING:
            logger.info(f"the change of the {_what(model)} is not watched: parameters are sharded over ranks.")
        else:
            self._start = _values(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log where it is time to look."""
        due = state.global_step % math.ceil(state.max_steps / _LOOKS) == 0
        if (due or state.global_step == 1) and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is measured to a training log, and judge it; other logs are left alone."""
        logs: dict[str, Any] = kwargs["logs"]
        last = ends_training(logs)
        if not last and not ("loss" in logs and "learning_rate" in logs):
            return
        numbers: dict[str, float] = {}
        model: Any = unwrap_ptune_model(kwargs["model"], type(self).__name__)
        if self._start is not None:
            numbers["prompt_change"] = _change(_values(model), self._start)
        if not last:
            self._latest = float(logs["loss"])
            for task, loss in _losses_by_task(logs, model).items():
                self._losses.setdefault(task, Losses(_chance(model, task))).add(loss, state.global_step)
            self._rate = max(self._rate, float(logs["learning_rate"]))
        else:
            self._rate = self._rate or args.learning_rate  # of a run without logs
            self._take_back(state)
        self._judge(args, state, model, numbers.get("prompt_change"), last)
        if last:
            numbers = self.summary = numbers | self.summary
        # infinities are no JSON
        self.add_numbers(logs, state, {k: v for k, v in numbers.items() if math.isfinite(v)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a prompt that did not learn count as a fresh start still."""
        if not self.found.keys().isdisjoint(("too_low", "flat")):
            for part in _parts(unwrap_ptune_model(kwargs["model"], type(self).__name__)):
                vars(part).pop(TRAINED, None)

    def _take_back(self, state: TrainerState) -> None:
        """Drop what was said of a loss that was flat half-way, and has fallen by the end."""
        if "flat" in self.found and not self._is_flat():
            del self.found["flat"], self.summary["learning_flat"]
            if state.is_world_process_zero:
                logger.warning("the loss was flat for a while, and has fallen since: no cure is needed.")

    def _judge(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PTunePreTrainedModel,
        change: float | None,
        last: bool,
    ) -> None:
        if any(not math.isfinite(v) for v in (self._latest, 0.0 if change is None else change)):
            self._report(state, "too_high", f"the loss or the {_what(model)} is not finite. {self._lower(model)}")
            return
        warmup = args.get_warmup_steps(state.max_steps)
        gone = state.global_step - warmup
        short = gone < _LEAST_STEPS
        if (short and not (last and gone >= _FEWEST_STEPS)) or state.global_step < state.max_steps / 4:
            return
        least = _LEAST_CHANGE / 10 if short else _LEAST_CHANGE
        if change is not None and change < least:
            if not self._late:
                measured = f"the {_what(model)} has changed by {100 * change:.2g} % of its start, expected more than "
                self._report(state, "too_low", f"{measured}{100 * least:g} %. {self._raise(model, change)}")
        elif self._has_risen(short, *self._is_lost(model, change)) and "too_low" not in self.found:
            self._report(state, "too_high", f"{self._tell_rise()}. {self._lower(model)}")
        if short or self._late or self.found or state.global_step < state.max_steps / 2:
            return
        if self._is_flat():
            self._report(state, "flat", f"{self._tell_flat()}. {self._unstick(model, change)}")

    def _is_lost(self, model: PTunePreTrainedModel, change: float | None) -> tuple[bool, bool]:
        """Whether the prompt has gone far at any rate, and whether it has at one that is far above the usual."""
        usual, gone = self._usual(model), change or 0.0
        return gone > _LOST, gone > _ASTRAY and usual is not None and self._rate >= _FAR * usual

    def _comparable(self) -> dict[str, Losses]:
        return {task: losses for task, losses in self._losses.items() if losses.comparable}

    def _trends(self) -> list[Trend]:
        return [losses.trend() for losses in self._comparable().values()]

    def _has_risen(self, short: bool, lost: bool, astray: bool = False) -> bool:
        if not (trends := self._trends()):
            return False
        trend = common_trend(trends)
        (first, error), (start, error_of_start) = trend.first, trend.start
        if first > math.log1p(_CERTAIN_RISE) and (lost or first > _RISE_ERRORS * error):
            return True
        if astray and trend.beyond > math.log1p(_CERTAIN_RISE):
            return True
        return not short and min(first, start) > math.log1p(_RISE) and start > _RISE_ERRORS * error_of_start

    def _is_flat(self) -> bool:
        """Whether nothing falls: no task by itself, nor all of them on average."""
        trends = self._trends()
        return bool(trends) and not any(_falls(trend) for trend in (*trends, common_trend(trends)))

    def _tell_rise(self) -> str:
        risen = {task: one for task, one in self._comparable().items() if one.latest > one.values[0]}
        parts = [
            f"the loss{_of(task)} is {one.latest:.4g} on average, above the {one.values[0]:.4g} of the first step"
            for task, one in risen.items()
        ]
        return "; ".join(parts)

    def _tell_flat(self) -> str:
        parts = [
            f"the loss{_of(task)} is {one.latest:.4g} on average, and was {one.values[0]:.4g} at first"
            for task, one in self._comparable().items()
        ]
        return f"{'; '.join(parts)}: no fall beyond its noise"

    def _usual(self, model: PTunePreTrainedModel) -> float | None:
        if not self._like_adam:
            return None
        if self.usual is not None:
            return self.usual
        found = defaults_of(model.config.method, getattr(model, "task", None), causal=model.config.over_decoder)
        return found.training.get("learning_rate")

    def _lower(self, model: PTunePreTrainedModel) -> str:
        usual = self._usual(model)
        target = usual if usual is not None and usual < self._rate else self._rate / 10
        return f"Lower the learning rate from {self._rate:.2g} to about {target:.2g}, or warm up for longer."

    def _unstick(self, model: PTunePreTrainedModel, change: float | None) -> str:
        usual = self._usual(model) or 0.0
        if self._rate > _FAR * usual > 0:
            return self._lower(model)
        # behind a network a small rate moves a prompt far: P-Tuning at 1e-5 by 17 %, and learns nothing
        if (change is not None and change < _SMALL_CHANGE) or self._rate < usual / 10:
            return self._raise(model, change)
        what, moved = _what(model), ""
        if change is not None:
            moved = f"The {what} has changed by {100 * change:.0f} %, so the rate is not too low. "
        length = " and number of virtual tokens" if what == "prompt" else ""
        return (
            f"{moved}See whether labels belong to their rows; else find learning rate (now {self._rate:.2g}){length}: "
            "hf-ptune sweep."
        )

    def _raise(self, model: PTunePreTrainedModel, change: float | None) -> str:
        usual = self._usual(model)
        if change == 0 and self._rate > 0 and (usual is None or self._rate >= usual / 1000):
            return (
                f"It gets no update at learning rate {self._rate:.2g}: let the optimizer hold it (the Trainer's own "
                "does), do not freeze it, and see whether the loss depends on it (GuardCallback tells)."
            )
        if usual is None or usual <= self._rate:
            usual = self._rate * 10
        target = f"to about {usual:.2g} ({model.config.method})" if usual else "above it"
        return f"Raise the learning rate from {self._rate:.2g} {target}, or train for longer."

    def _report(self, state: TrainerState, name: str, message: str) -> None:
        if name in self.found:
            return
        self.found[name] = f"step {state.global_step} of {state.max_steps}: {message}"
        self.summary[f"learning_{name}"] = float(state.global_step)
        if state.is_world_process_zero:
            logger.warning(self.found[name])


def _parts(model: Any) -> list[Any]:
    return [model.model_of(task) for task in model.tasks] if hasattr(model, "model_of") else [model]


def _goes_on(model: Any) -> bool:
    """Whether a prompt has been trained before: in this process, in a saved adapter, or in the one it starts from."""
    known = any(_is_trained(part) or vars(part).get(TRAINED, 0) >= _LEAST_STEPS for part in _parts(model))
    return known or model.config.prompt_tuning_init == "ADAPTER"


def _is_trained(model: Any) -> bool:
    """Whether a model was loaded from an adapter that has been trained; `hf-ptune init` writes fresh ones."""
    source = vars(model).get(SOURCE, ("",))[0]
    return bool(source) and not (Path(source).is_dir() and is_fresh(source))


def _falls(trend: Trend) -> bool:
    clear = any(-fall > max(-math.log1p(-_GAIN), _ERRORS * error) for fall, error in trend.falls)
    return clear or trend.falls[1][0] <= math.log1p(-_CLEAR_GAIN)


def _what(model: Any) -> str:
    return "adapter" if model.prompt is None else "prompt"


def _of(task: str) -> str:
    return f" of task {task}" if task else ""


def _losses_by_task(logs: dict[str, Any], model: Any) -> dict[str, float]:
    """Losses that may be compared with each other, by task."""
    if not hasattr(model, "model_of"):
        return {"": float(logs["loss"])}
    named = {task: logs.get(f"{TASK_LOSS}{task}") for task in model.tasks}
    return {task: float(loss) for task, loss in named.items() if loss is not None}


def _chance(model: Any, task: str) -> float:
    """The loss of a head that takes all classes for equally likely; infinite where a loss is of something else."""
    one = model.model_of(task) if hasattr(model, "model_of") else model
    if getattr(one, "task", None) not in ("SEQ_CLS", "TOKEN_CLS"):
        return math.inf
    kind, count = one.config.problem_type, len(one.config.id2label or {})
    if kind == "regression" or count < 2:
        return math.inf
    return math.log(2 if kind == "multi_label_classification" else count)


@torch.no_grad()
def _values(model: Any) -> Tensor:
    """What is watched: the encoded prompt, or what the adapter trains besides a head, or the head where that is all."""
    if model.prompt is None:
        heads = head_names(model.backbone, model.task, model.config.modules_to_save)
        trained = model.adapter_parameter_names()
        watched = trained - {f"backbone.{n}" for n in heads} or trained
        parts = [p.detach().float().flatten() for n, p in model.named_parameters() if n in watched]
        return torch.cat([p.to(parts[0].device) for p in parts])
    was_training = model.prompt.training
    model.prompt.eval()  # without dropout inside a reparameterisation
    encoded: Tensor = model.prompt().detach().float().clone()
    model.prompt.train(was_training)
    return encoded


def _change(now: Tensor, start: Tensor) -> float:
    norm = start.norm().item() or math.sqrt(start.numel())
    return (now - start).norm().item() / norm
