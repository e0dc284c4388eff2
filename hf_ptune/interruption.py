"""Interruptions: what a run can go on from, and how what is being written meanwhile is written to its end."""

import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from hf_ptune.engines import is_whole, last_checkpoint


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


class HeldInterruptions:
    """Hold interruptions back while something is written, and raise them at its end.

    SIGTERM interrupts as Ctrl-C does, so that a scheduler or a shutdown is not taken for a crash.
    """

    def __init__(self) -> None:
        self._open = self._pending = False
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
            raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Raise interruptions at once, and first of all one that has been held back."""
        self._open = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._open = False

    def _take(self, number: int, frame: object) -> None:
        if self._open:
            raise KeyboardInterrupt
        self._pending = True
