"""Interruptions: what a run can go on from, and how what is being written meanwhile is written to its end."""

import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, sort_checkpoints

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
    with _at_sigterm(_terminate):
        yield


@contextmanager
def _at_sigterm(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let SIGTERM be handled otherwise meanwhile, unless the process ignores it."""
    here = threading.current_thread() is threading.main_thread()  # signals are handled there alone
    if not here or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a launcher passes on what a scheduler has told every process
    raise Terminated


@contextmanager
def without_handler(arguments: TrainingArguments) -> Iterator[None]:
    """Let a Trainer be made without transformers' callback of `enable_jit_checkpoint`.

    That one handles SIGTERM from there on, also where training never begins, lets a run go on to its last figures as
    if it had been trained, and writes within a step, where dropout has drawn already.
    """
    asked, arguments.enable_jit_checkpoint = arguments.enable_jit_checkpoint, False
    try:
        yield
    finally:
        arguments.enable_jit_checkpoint = asked


class TerminationCallback(TrainerCallback):
    """Let SIGTERM end a training after a checkpoint, which the Trainer writes when it has logged and measured.

    Args:
        trainer: about to train.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._told = self._saves = False
        self._last = False  # whether the Trainer may save for the last time before it goes on to another step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remember SIGTERM while the Trainer trains, unless the process ignores it.

        Raises:
            Terminated: it has come to any rank.
        """
        strategy = self.trainer.args.save_strategy
        self.trainer.add_callback(self)  # the last one: the others have seen what it ends
        try:
            with _at_sigterm(self._take):
                yield
        finally:
            self.trainer.remove_callback(self)
            self.trainer.args.save_strategy = strategy
        if self._any_told():  # too late for a checkpoint
            raise Terminated

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, unless the end of the epoch comes next, which may log and measure too."""
        ends = float(state.epoch or 0).is_integer() or control.should_training_stop or control.should_epoch_stop
        self._last = not ends
        self._ask(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint."""
        self._last = True
        self._ask(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, as where SIGTERM had come before."""
        self._ask(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run, where this checkpoint has been asked for.

        Raises:
            Terminated: it is written.
        """
        if self._saves:
            self.trainer.accelerator.wait_for_everyone()  # each says what to go on from
            raise Terminated

    def _ask(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self._any_told() and self._last:
            control.should_save = self._saves = True
            if args.save_strategy == SaveStrategy.BEST:  # the Trainer would drop all but the best
                args.save_strategy = SaveStrategy.STEPS

    def _any_told(self) -> bool:
        """Whether SIGTERM has come to any rank; all of them have to come."""
        accelerator = self.trainer.accelerator
        if self._told:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            self._told = True
            return True
        return False

    def _take(self, number: int, frame: object) -> None:
        self._told = True


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
