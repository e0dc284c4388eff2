"""What a run that is interrupted can go on from: the checkpoints that it wrote itself."""

import shlex
from collections.abc import Mapping
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
