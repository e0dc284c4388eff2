"""Train on two ranks with every callback; each rank writes what it found."""

import json
import os
import sys
from pathlib import Path

import torch
from setup_runs import llama, trainer, wrap
from torch import distributed

from hf_ptune.callbacks import FreezeBackboneCallback, GuardCallback, MemoryCallback


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model, memory = wrap(llama()), MemoryCallback()
    freeze = FreezeBackboneCallback({2: ["backbone.model.layers.1.mlp.*"]})
    start = model.backbone.model.layers[1].mlp.up_proj.weight.detach().clone()
    run = trainer(
        model,
        folder,
        [memory, freeze, GuardCallback()],
        per_device_train_batch_size=2,
        ddp_backend="gloo",
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    run.train()
    rank = run.args.process_index
    found = {
        "wrapper": type(run.model_wrapped).__name__,
        "log": run.state.log_history,
        "summary": memory.summary,
        "sums": {n: p.double().sum().item() for n, p in model.named_parameters()},
        "moved": not torch.equal(start, model.backbone.model.layers[1].mlp.up_proj.weight),
        "trainable": model.backbone.model.layers[1].mlp.up_proj.weight.requires_grad,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort the process while the interpreter ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
