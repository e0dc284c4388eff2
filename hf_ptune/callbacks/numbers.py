"""Numbers that callbacks add to the Trainer's logs, before other callbacks hand these on."""

import functools
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler


class NumbersCallback(TrainerCallback):
    """Stand before the callbacks of `report_to` while training, so that the logs they receive have the numbers."""

    def add_numbers(self, logs: dict[str, Any], state: TrainerState, numbers: dict[str, float]) -> None:
        """Write numbers into a log and into its copy in the history.

        Args:
            logs: what the callbacks receive.
            state: of the Trainer.
            numbers: by name.
        """
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)


def _numbers_first(original: Any) -> Any:
    """Let those that add numbers lead from the start of training on, whose own order stays."""

    @functools.wraps(original)
    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        control = original(self, *args, **kwargs)
        self.callbacks.sort(key=lambda callback: not isinstance(callback, NumbersCallback))
        return control

    vars(on_train_begin)["_ptune"] = True
    return on_train_begin


if "_ptune" not in vars(CallbackHandler.on_train_begin):
    CallbackHandler.on_train_begin = _numbers_first(CallbackHandler.on_train_begin)  # type: ignore[method-assign]
