"""Tiny models, data and Trainers for the tests of the callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model

VOCABULARY = 50


def llama(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            **settings,
        )
    )


def bert(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            num_labels=3,
            **settings,
        )
    )


def wrap(backbone: PreTrainedModel, method: str = "p_tuning_v2", **options: Any) -> PTunePreTrainedModel:
    torch.manual_seed(1)
    return get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=4, **options))


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens `[T]`, every second with padding."""

    def __init__(self, count: int = 16, length: int = 7, classes: int | None = None) -> None:
        made = torch.Generator().manual_seed(3)
        self.ids = torch.randint(1, VOCABULARY, (count, length), generator=made)
        self.mask = torch.ones_like(self.ids)
        self.mask[1::2, -2:] = 0
        self.classes = classes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.ids[index] if self.classes is None else torch.tensor(index % self.classes)
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": labels}


def batch(rows: Rows, count: int = 2) -> dict[str, torch.Tensor]:
    samples = [rows[i] for i in range(count)]
    return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


def trainer(
    model: torch.nn.Module,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    rows: torch.utils.data.Dataset | None = None,
    trainer_class: type[Trainer] = Trainer,
    optimizers: Any = (None, None),
    **settings: Any,
) -> Trainer:
    chosen: dict[str, Any] = {
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return trainer_class(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(chosen | settings)),
        train_dataset=Rows() if rows is None else rows,
        eval_dataset=Rows(4),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}
