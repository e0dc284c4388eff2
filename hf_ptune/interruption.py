"""Interruptions: what a run can go on from, and how what is being written meanwhile is written to its end."""

import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import sort_checkpoints

from hf_ptune.engines import is_whole, last_checkpoint
from hf_ptune.errors import Terminated


def checkpoints_in(folder: str) -> dict[str, int]:
    """Whole checkpoints of a run's output folder in order of their steps, and when each was finished."""
    if not Path(folder).is_dir():
        return {}
    whole = [str(c) for c in sort_checkpoints(folder) if is_whole(c)]
    return {checkpoint: (Path(checkpoint) / TRAINER_STATE_NAME).stat().st_mtime_ns for checkpoint in whole}


def how_to_go_on(folder: str, resume: Any, earlier: Mapping[str, int]) -> str:
    """Say what an interrupted run goes on from.

    Args:
        folder: its output folder.
        resume: its `training.resume_from_checkpoint`.
        earlier: what `checkpoints_in` found before it began: checkpoints of others, which may be of later steps.
    """
    last = last_checkpoint(folder)
    own = [c for c, finished in checkpoints_in(folder).items() if earlier.get(c) != finished]
    if own:
        value = "true" if own[-1] == last else own[-1]
        further = shlex.quote(f"--training.resume_from_checkpoint={value}")
        return f"interrupted; {further} goes on from {own[-1]}."
    began = last if resume in (True, "true") else resume
    if began:
        return f"interrupted before a further checkpoint was written; the same command goes on from {began}."
    return "interrupted before a checkpoint was written; the same command starts anew."


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM interrupt what is done meanwhile, once, unless the process ignores it."""
    here = threading.current_thread() is threading.main_thread()  # signals are handled there alone
    if not here or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a launcher passes on what a scheduler has told every process
    raise Terminated


class TerminationCallback(TrainerCallback):
    """Let a checkpoint of `enable_jit_checkpoint` end its run as interrupted, in the place of transformers' callback.

    That one lets a run go on to its last figures and its adapter as if it had been trained, writes within a step,
    where dropout has drawn already, and lets each rank stop at a step of its own.

    Args:
        trainer: about to train, with that callback.
        own: that callback.
    """

    def __init__(self, trainer: Trainer, own: JITCheckpointCallback) -> None:
        self.trainer, self.own = trainer, own

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a checkpoint where SIGTERM has come to any rank.

        Raises:
            Terminated: it is written.
        """
        accelerator = self.trainer.accelerator
        if self.own.jit_manager.is_checkpoint_requested:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            self.own.jit_manager.execute_jit_checkpoint()
            self.trainer.callback_handler.on_save(args, state, control)
            accelerator.wait_for_everyone()  # each says what to go on from
            self.own.on_train_end(args, state, control)
            raise Terminated

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give SIGTERM back."""
        self.own.on_train_end(args, state, control)


class HeldInterruptions:
    """Hold interruptions back while something is written, and raise them at its end.

    SIGTERM interrupts as Ctrl-C does, so that a scheduler or a shutdown is not taken for a crash.
    """

    def __init__(self) -> None:
        self._open = False
        self._pending: type[KeyboardInterrupt] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "HeldInterruptions":
        if threading.current_thread() is threading.main_thread():  # signals are handled there alone
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._pending and kind is None:
            raise self._pending

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Raise interruptions at once, and first of all one that has been held back."""
        self._open = True
        try:
            if self._pending:
                raise self._pending
            yield
        finally:
            self._open = False

    def _take(self, number: int, frame: object) -> None:
        told = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self._open:
            raise told
        self._pending = told
