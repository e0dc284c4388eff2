"""Watch whether a run learns, and say once what is wrong and what to change."""

import itertools
import math
import statistics
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_ptune.backbone import head_names
from hf_ptune.callbacks.freeze import SHARDING
from hf_ptune.defaults import defaults_of
from hf_ptune.modeling_ptune import PTunePreTrainedModel

logger = logging.get_logger(__name__)
_LOOKS = 20  # times that a run is looked at, where its own logs are rarer
_LEAST_STEPS = 20  # after warm-up; fewer say nothing
_FEWEST_STEPS = 5  # after which a short run may be judged at its end
_LEAST_POINTS = 4
# P-Tuning v2 on MiniLM, after 20 of 80 steps: 0.0014 at learning rate 2e-4, whose loss fell by 3 % in all; 0.007 at
# 1e-3, which learnt slowly; 0.11 at 2e-2, which learnt well
_LEAST_CHANGE = 3e-3
_RISE, _CERTAIN_RISE, _GAIN, _CLEAR_GAIN = 0.2, 0.5, 0.02, 0.1  # of the first loss
_SMALL_CHANGE = 0.05  # below it, a flat loss is the learning rate's fault: prompts that learnt changed by more
_FAR = 10.0  # a rate so many times the usual one is not too low, however little a loss falls
_ERRORS = 3.0  # standard errors that a difference of losses has to be beyond


class LearningCallback(TrainerCallback):
    """Report a learning rate that is too high or too low, a prompt that never moves, and a loss that stays flat.

    Every training log gets `prompt_change`, the distance of the encoded prompt from its start relative to the start
    (its root mean square where it starts at zero; BitFit: of the bias terms). The log that ends training gets
    `learning_too_high`, `learning_too_low` and `learning_flat`: the step at which each was found, where it was.
    A run that logs less often than twenty times is logged twenty times, and at its first step.

    Found are, each once, as a warning on the first rank with what was measured and the cure:
    `too_high`: loss or prompt is not finite; or, after a quarter of the run, the latest quarter of the losses lies
    above the first step's by half, or by a fifth and three standard errors. `too_low`: after a quarter of the run,
    and 20 steps after warm-up, the prompt has changed by less than 0.3 %. `flat`: after half of the run, the latest
    quarter of the losses lies neither below the first step's nor below the first quarter's, by 2 % and three
    standard errors, nor by 10 % whatever the error. Runs of fewer steps are judged at their end, where they are clear:
    a loss that rose by half, a prompt that changed by less than 0.03 %. A run that goes on from a checkpoint beyond
    its first tenth is judged by `too_high` alone: what had been learnt before is not known.

    Args:
        usual: the learning rate that cures lead to; what the model's method starts with on its task when unset.

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
        self._losses: list[float] = []
        self._steps: list[int] = []  # of each loss
        self._rate = 0.0
        self._start: Tensor | None = None
        self._late = False

    # events ------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the start."""
        self._begin()
        self._late = state.global_step > state.max_steps / 10
        if args.distributed_state is not None and args.distributed_state.distributed_type in SHARDING:
            logger.info("the change of the prompt is not watched: parameters are sharded over ranks.")
        else:
            self._start = _values(_unwrap(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log where it is time to look."""
        due = state.global_step % math.ceil(state.max_steps / _LOOKS) == 0
        if (due or state.global_step == 1) and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is measured to a training log, and judge it; other logs are left alone."""
        logs: dict[str, Any] = kwargs["logs"]
        last = "train_runtime" in logs
        if not last and not ("loss" in logs and "learning_rate" in logs):
            return
        numbers: dict[str, float] = {}
        model = _unwrap(kwargs["model"])
        if self._start is not None:
            numbers["prompt_change"] = _change(_values(model), self._start)
        if not last:
            self._losses.append(float(logs["loss"]))
            self._steps.append(state.global_step)
            self._rate = max(self._rate, float(logs["learning_rate"]))
        self._judge(args, state, model, numbers.get("prompt_change"), last)
        if last:
            numbers = self.summary = numbers | self.summary
        # infinities are no JSON
        numbers = {k: v for k, v in numbers.items() if math.isfinite(v)}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    # judgement ---------------------------------------------------------------------------------------------

    def _judge(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PTunePreTrainedModel,
        change: float | None,
        last: bool,
    ) -> None:
        if any(not math.isfinite(v) for v in (*self._losses[-1:], *([] if change is None else [change]))):
            self._report(state, "too_high", f"the loss or the prompt is not finite. {self._lower(model)}")
            return
        warmup = args.get_warmup_steps(state.max_steps)
        gone = state.global_step - warmup
        short = gone < _LEAST_STEPS
        if (short and not (last and gone >= _FEWEST_STEPS)) or state.global_step < state.max_steps / 4:
            return
        least = _LEAST_CHANGE / 10 if short else _LEAST_CHANGE
        if change is not None and change < least and not self._late:
            measured = f"the prompt has changed by {100 * change:.2g} % of its start, expected more than "
            self._report(state, "too_low", f"{measured}{100 * least:g} %. {self._raise(model, change)}")
        if len(self._losses) < _LEAST_POINTS:
            return
        first, recent = self._losses[0], self._recent()
        error = self._error()
        # what blows up is noisy too, so that a large rise needs no further test
        noticed = math.inf if short else max(_RISE * abs(first), _ERRORS * error)
        if recent - first > min(_CERTAIN_RISE * abs(first), noticed):
            measured = f"the loss is {recent:.4g} on average, above the {first:.4g} of the first step."
            self._report(state, "too_high", f"{measured} {self._lower(model)}")
        if short or self._late or self.found or state.global_step < state.max_steps / 2:
            return
        if self._is_flat(first, recent, error):
            measured = f"the loss is {recent:.4g} on average, and was {first:.4g} at first: no fall beyond its noise."
            self._report(state, "flat", f"{measured} {self._unstick(model, change)}")

    def _quarter(self) -> int:
        return max(2, len(self._losses) // 4)

    def _recent(self) -> float:
        return statistics.fmean(self._losses[-self._quarter() :])

    def _error(self) -> float:
        """Standard deviation of the loss of one step: logs are means over several, and a trend does not count."""
        losses = self._losses[1:]  # the first is of one step, the others of some
        differences = [b - a for a, b in itertools.pairwise(losses)]
        of_a_log = math.sqrt(statistics.fmean(d * d for d in differences) / 2)
        return of_a_log * math.sqrt((self._steps[-1] - self._steps[0]) / max(len(losses), 1))

    def _is_flat(self, first: float, recent: float, error: float) -> bool:
        early = statistics.fmean(self._losses[1 : 1 + self._quarter()])
        steps = self._quarter() * (self._steps[-1] - self._steps[0]) / (len(self._losses) - 1)
        below_first = first - recent > max(_GAIN * abs(first), _ERRORS * error)
        below_early = early - recent > max(_GAIN * abs(early), _ERRORS * error * math.sqrt(2 / steps))
        return not below_first and not below_early and early - recent < _CLEAR_GAIN * abs(early)

    def _usual(self, model: PTunePreTrainedModel) -> float | None:
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
        moved = (
            "" if change is None else f"The prompt has changed by {100 * change:.0f} %, so the rate is not too low. "
        )
        return (
            f"{moved}See whether labels belong to their rows; else find learning rate (now {self._rate:.2g}) and "
            "number of virtual tokens: hf-ptune sweep."
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
        method = model.config.method
        return f"Raise the learning rate from {self._rate:.2g} to about {usual:.2g} ({method}), or train for longer."

    def _report(self, state: TrainerState, name: str, message: str) -> None:
        if name in self.found:
            return
        self.found[name] = f"step {state.global_step} of {state.max_steps}: {message}"
        self.summary[f"learning_{name}"] = float(state.global_step)
        if state.is_world_process_zero:
            logger.warning(self.found[name])


def _unwrap(model: Any) -> Any:
    return extract_model_from_parallel(model, keep_torch_compile=False)


@torch.no_grad()
def _values(model: Any) -> Tensor:
    """What is watched: the encoded prompt, or what the adapter trains besides a head."""
    if model.prompt is None:
        heads = head_names(model.backbone, model.task, model.config.modules_to_save)
        watched = model.adapter_parameter_names() - {f"backbone.{n}" for n in heads}
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
