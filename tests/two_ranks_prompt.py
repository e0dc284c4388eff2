"""Gradients of a shared prompt on two ranks with half a batch each; each rank writes its own."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from families import batch, build
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hf_ptune import PTuneConfig, get_ptune_model


def loss_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy in float64, which transformers' own is not."""
    labels = inputs.pop("labels")
    return F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(
    family: str, method: str, rows: slice, parallel: bool, accumulate: bool, checkpointing: bool
) -> list[float]:
    """Gradients of all prompt parameters, flat, after one step on some rows of a batch of eight."""
    torch.manual_seed(0)
    model = get_ptune_model(build(family), PTuneConfig(method=method, num_virtual_tokens=4)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {k: v[rows] for k, v in batch(family, rows=8).items()}
    wrapped = DistributedDataParallel(model) if parallel else model
    parts = [slice(0, 2), slice(2, 4)] if accumulate else [slice(None)]
    for number, part in enumerate(parts):
        piece = {k: v[part] for k, v in inputs.items()}
        if parallel and number + 1 < len(parts):
            with wrapped.no_sync():
                (loss_of(wrapped, piece) / len(parts)).backward()
        else:
            (loss_of(wrapped, piece) / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in model.prompt.parameters()]).tolist()


CASES = [
    ("gpt2", "prompt_tuning", False, False),
    ("llama", "prompt_tuning", False, False),
    ("llama", "p_tuning", True, False),
    ("mistral", "prompt_tuning", False, True),
    ("bloom", "p_tuning", False, False),
    ("qwen3", "prefix_tuning", True, True),
]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    found = [gradients(family, method, mine, True, *how) for family, method, *how in CASES]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
