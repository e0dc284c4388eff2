"""Let learning rates fall by a factor with every epoch, which no schedule of transformers does."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_ptune.errors import ConfigError


class DecayCallback(TrainerCallback):
    """Multiply all learning rates by a factor after each epoch, on top of the Trainer's schedule and its warm-up.

    With `lr_scheduler_type="constant"` and a factor of 0.95 it is the schedule of the scripts of P-Tuning v2 (Liu et
    al. 2022) for tagging and question answering.

    Args:
        factor: more than 0, and at most 1.

    Raises:
        ConfigError: the factor is out of range.
    """

    def __init__(self, factor: float) -> None:
        if not 0 < factor <= 1:
            raise ConfigError(f"DecayCallback: factor={factor}; expected more than 0 and at most 1.")
        self.factor = factor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the schedule's place; a resumed run goes on where its steps are.

        Raises:
            ConfigError: the schedule follows measurements, or the rows do not say how many of them an epoch has.
        """
        schedule, rows = kwargs["lr_scheduler"], kwargs["train_dataloader"]
        schedule = getattr(schedule, "scheduler", schedule)  # engines wrap it
        if not isinstance(schedule, LambdaLR):
            raise ConfigError(
                f"DecayCallback cannot be joined with {type(schedule).__name__}; set lr_scheduler_type to constant, or "
                "leave one of them out."
            )
        if not has_length(rows):
            raise ConfigError("DecayCallback counts epochs, but the rows have no length; leave it out.")
        steps = math.ceil(len(rows) / args.gradient_accumulation_steps)
        schedule.lr_lambdas = [self._falling(own, steps) for own in schedule.lr_lambdas]

    def _falling(self, own: Callable[[int], float], steps: int) -> Callable[[int], float]:
        own = getattr(own, "before_decay", own)  # a schedule of the user's own may be trained with twice

        def falling(step: int) -> float:
            return own(step) * self.factor ** (step // steps)

        falling.before_decay = own  # type: ignore[attr-defined]
        return falling
