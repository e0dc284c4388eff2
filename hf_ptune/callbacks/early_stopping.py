"""End training when held-out rows get no better, where a run goes on from a checkpoint too."""

from typing import Any

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):  # checkpoints keep its count by this name
    """Count evaluations without progress, of which that before the first step of a run that goes on is none."""

    _began: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the step."""
        super().on_train_begin(args, state, control, **kwargs)
        self._began = state.global_step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Count, where a step has been trained."""
        if state.global_step != self._began:
            super().on_evaluate(args, state, control, metrics, **kwargs)
