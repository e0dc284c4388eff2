"""Models, rows and Trainers that are the same in one process and on every engine."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from families import batch, build, main_task
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_ptune import FreezeBackboneCallback, PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.backbone import TASKS
from hf_ptune.engines import ours
from hf_ptune.tasks import get_task

_ARGUMENTS = {field.name for field in fields(Seq2SeqTrainingArguments)}
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in _ARGUMENTS)
ROWS = 16
ODD = 7  # rows of an evaluation, which two ranks cannot share evenly


def parts(family: str) -> tuple[str, str]:
    """A family and its task: `bert/TOKEN_CLS`, or its main one."""
    name, _, task = family.partition("/")
    return name, task or main_task(name)


def save_bases(folder: Path, families: Sequence[str]) -> None:
    for family in families:
        build(*parts(family)).float().save_pretrained(folder / family)


def load(folder: Path, family: str, method: str, **options: Any) -> PTunePreTrainedModel:
    """Load a base, which ZeRO-3 splits at this very moment, and wrap it."""
    backbone: PreTrainedModel = TASKS[parts(family)[1]].from_pretrained(folder / family)
    torch.manual_seed(2)
    return get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=4, **options))


def rows(family: str) -> list[dict[str, Tensor]]:
    name, task = parts(family)
    whole = batch(name, rows=ROWS)
    if task == "TOKEN_CLS":
        whole["labels"] = whole["input_ids"] % 2
    return [{k: v[n] for k, v in whole.items()} for n in range(ROWS)]


def ragged(family: str) -> list[dict[str, Tensor]]:
    """Rows of four lengths, so that the ranks' batches differ in theirs."""
    return [{k: v[: 4 + n % 4] if v.dim() else v for k, v in row.items()} for n, row in enumerate(rows(family)[:ODD])]


def pad(family: str) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]:
    """A collator that pads where the family generates from: decoders on the left, encoders on the right."""
    side = "left" if parts(family)[1] == "CAUSAL_LM" else "right"

    def collate(features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        fill = {"labels": -100}
        return {
            name: pad_sequence([f[name] for f in features], True, fill.get(name, 0), padding_side=side)
            if first.dim()
            else torch.stack([f[name] for f in features])
            for name, first in features[0].items()
        }

    return collate


def generated(run: Seq2SeqTrainer, family: str) -> list[list[int]]:
    """What a Trainer's model answers to rows of several lengths, without the padding."""
    answers = run.predict(ragged(family), max_new_tokens=6).predictions.tolist()
    return [[token for token in answer if token > 0] for answer in answers]


class Numbers:
    """Write tokens as their numbers."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": []}

    def batch_decode(self, ids: Tensor, **options: Any) -> list[str]:
        return [" ".join(str(i) for i in row.tolist() if i > 0) for row in ids]


def scores(run: Trainer, family: str) -> dict[str, float]:
    """What a task measures of answers to rows that ranks cannot share evenly."""
    sources = [row["input_ids"].tolist() for row in ragged(family)]
    features = [{"source_ids": s, "references": [" ".join(map(str, s))]} for s in sources]
    run.processing_class = Numbers()  # type: ignore[assignment]
    task = get_task(parts(family)[1])(generate=True, max_new_tokens=4, bleu_tokenize="none")
    return task.measure_further(run, features)


def trainer(
    bases: Path,
    family: str,
    method: str,
    folder: Path,
    world: int,
    callbacks: Sequence[TrainerCallback] = (),
    rows_: Sequence[Any] | None = None,
    compute_metrics: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Seq2SeqTrainer:
    """A Trainer that sees eight rows in every update, on however many ranks.

    The base is loaded after the arguments have been made, so that ZeRO-3 splits it as it comes.
    """
    if AcceleratorState._shared_state:  # DeepSpeed would keep the settings of the last Trainer of this process
        AcceleratorState._reset_state()
    chosen: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4 // world,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,  # Adam divides noise of the last bit by epsilon where a gradient is almost zero
        "weight_decay": 0.1,
        CHECKPOINTING: True,
        "logging_steps": 1,
        "save_steps": 2,
        "save_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    data = rows(family)
    arguments = Seq2SeqTrainingArguments(output_dir=str(folder), **(chosen | settings))
    return Seq2SeqTrainer(
        model=load(bases, family, method, **(options or {})),
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:ODD] if rows_ is None else rows_,
        compute_metrics=compute_metrics,
        data_collator=pad(family),
        callbacks=[FreezeBackboneCallback(), *callbacks],
    )


def adapter(run: Trainer) -> dict[str, list[float]]:
    """The values of the adapter that a Trainer has trained, whole; all ranks have to come."""
    model = ours(run.model)
    assert model is not None
    return {n: t.double().flatten().tolist() for n, t in model.adapter_state_dict().items()}
