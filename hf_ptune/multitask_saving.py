"""Checkpoints of any Trainer over several tasks: an adapter folder for each, as `save_pretrained` writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from hf_ptune import patching
from hf_ptune.engines import engine_name, splits
from hf_ptune.errors import PTuneError
from hf_ptune.multitask import MultiTaskPrompt
from hf_ptune.publishing import save_tokenizer


def replaces(name: str) -> Callable[[Any], Any]:
    """Let the Trainer call a function here in place of its own method, for models of several tasks."""
    return patching.replaces(Trainer, name, lambda t: isinstance(getattr(t, "model", None), MultiTaskPrompt))


@replaces("create_accelerator_and_postprocess")
def _create_accelerator(trainer: Any, original: Any) -> None:
    original()
    if splits(trainer):
        raise PTuneError(
            f"{engine_name()} splits a model over ranks, and several tasks over one base are several models. "
            "Launch them on one process or with DDP: recipes/accelerate/two_cpu_processes.yaml, ddp.yaml."
        )


@replaces("_save")
def _save(trainer: Any, original: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapters, and the tokenizer beside each: one file would hold the base, by as many names as tasks."""
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
    trainer.model.save_pretrained(folder)
    for task in trainer.model.tasks if trainer.processing_class is not None else ():
        save_tokenizer(trainer.processing_class, folder / task)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


@replaces("_load_from_checkpoint")
def _load_from_checkpoint(trainer: Any, original: Any, resume_from_checkpoint: str, model: Any = None) -> None:
    trainer.model.load_adapters(resume_from_checkpoint)


@replaces("_load_best_model")
def _load_best_model(trainer: Any, original: Any) -> None:
    trainer.accelerator.wait_for_everyone()
    trainer.model.load_adapters(str(trainer.state.best_model_checkpoint))
