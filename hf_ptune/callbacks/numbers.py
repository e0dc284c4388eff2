"""Numbers that callbacks add to the Trainer's logs, before other callbacks hand these on."""

from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

from hf_ptune.patching import replaces


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


@replaces(CallbackHandler, "on_train_begin")
def _numbers_first(handler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Let those that add numbers lead from the start of training on, whose own order stays."""
    control = original(*args, **kwargs)
    handler.callbacks.sort(key=lambda callback: not isinstance(callback, NumbersCallback))
    return control
