"""Push an adapter from two ranks by every way; ranks print what they got."""

import os
import sys
from pathlib import Path

import torch
from families import batch, build
from torch import distributed
from transformers import Trainer, TrainingArguments

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune import hub as pushing
from hf_ptune.errors import HubError


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    pushing._wait = lambda *_: 0.0
    model = get_ptune_model(build("llama").float(), PTuneConfig(num_virtual_tokens=2))
    model.config.base_model_name_or_path = "alice/base"
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        push_to_hub=True,
        hub_model_id="alice/by-trainer",
    )
    rows = [{k: v[0] for k, v in batch("llama").items()} for _ in range(4)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    address = model.push_to_hub("alice/by-model")
    try:
        model.push_to_hub("alice/failing")
        refused = False
    except HubError:
        refused = True
    rank = distributed.get_rank()
    (folder / f"rank{rank}.txt").write_text(f"{address} {refused}")
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # a process group's end is flaky


if __name__ == "__main__":
    main(Path(sys.argv[1]))
