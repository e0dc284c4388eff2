"""Train every method on two ranks, count what travels, and push; each rank writes what it found."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import on_cpu
import torch
from setup_engines import adapter, trainer
from torch import distributed
from transformers import TrainerCallback

from hf_ptune import MemoryCallback, ModelCardCallback

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "bitfit")
FAMILY = "gpt2"  # has biases, and counts in float32 throughout
# what is trained -> family, method, and its options
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {m: (FAMILY, m, {}) for m in METHODS}
CASES["layer_mix"] = ("bert/TOKEN_CLS", "p_tuning_v2", {"head_states": "mix"})
CASES["head_window"] = ("bert/TOKEN_CLS", "p_tuning_v2", {"head_window": "neighbours"})
CASES["mix_under_mean"] = ("bert", "p_tuning_v2", {"head_states": "mix", "pooling": "mean"})
STEPS = 3
# a single step of Adam divides by the gradient's own size, noise of the last bit included
SETTINGS: dict[str, Any] = {"optim": "sgd", "max_steps": STEPS, "save_strategy": "no", "learning_rate": 0.1}
PUSHED = "alice/from-two"


class CountBytes(TrainerCallback):
    """Count the bytes of gradients that DistributedDataParallel reduces."""

    def __init__(self) -> None:
        self.run: Any = None
        self.bytes: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.bytes:
            self.run.model_wrapped.register_comm_hook(None, self._reduce)
        self.bytes.append(0)

    def _reduce(self, state: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        self.bytes[-1] += buffer.numel() * buffer.element_size()
        work = distributed.all_reduce(buffer.div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])


def main(folder: Path, methods: list[str], pushed: str) -> None:
    on_cpu.prepare()
    further = {"ddp_backend": "gloo", "use_cpu": "DS_ACCELERATOR" not in os.environ}
    sharded = "DS_ACCELERATOR" in os.environ or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if not sharded:
        further["ddp_find_unused_parameters"] = False
    found: dict[str, Any] = {}
    for method in methods:
        counting = CountBytes()
        watching = [MemoryCallback(), ModelCardCallback(), *([] if sharded else [counting])]
        push = {"push_to_hub": True, "hub_model_id": PUSHED} if method == pushed else {}
        family, name, options = CASES[method]
        settings = SETTINGS | further | push
        run = trainer(folder / "bases", family, name, folder / method, 2, watching, options=options, **settings)
        counting.run = run
        run.train()
        if push:
            run.model.config.base_model_name_or_path = "alice/base"
            run.push_to_hub()
        sizes = [p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad]
        found[method] = {
            "wrapper": [c.__name__ for c in type(run.model_wrapped).__mro__],
            "adapter": adapter(run),
            "travelled": counting.bytes,
            "bytes": sum(sizes),
        }
    (folder / f"rank{distributed.get_rank()}.json").write_text(json.dumps(found))
    on_cpu.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3])
