"""Refuse a metric for the best model that is not measured, as soon as something is measured."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ptune.cards import TIMES
from hf_ptune.errors import RecipeError


class BestMetricCallback(TrainerCallback):
    """Look at the first evaluation, which may be before the first step, for `metric_for_best_model`."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare names.

        Raises:
            RecipeError: held-out rows were measured, and not by that metric.
        """
        measured = {n.removeprefix("eval_") for n in kwargs.get("metrics", {}) if n.startswith("eval_")}
        wanted = args.metric_for_best_model
        if measured and wanted is not None and wanted.removeprefix("eval_") not in measured:
            names = sorted(n for n in measured if not n.endswith(TIMES))
            raise RecipeError(
                f"training.metric_for_best_model is {wanted!r}, which is not measured; expected "
                f"one of {', '.join(names)}."
            )
