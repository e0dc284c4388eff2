"""What keeps engines on the CPU that are made for accelerators. Imported by scripts that `launch.py` starts."""

import os
import sys
from typing import Any

import torch
from torch import distributed


def prepare() -> None:
    """Let accelerate's FSDP2 shard on a CPU, where it would silently turn into DDP; let DeepSpeed compile nothing."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from accelerate.state import AcceleratorState, DistributedType

        original = AcceleratorState.__init__

        def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
            original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
                self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

        AcceleratorState.__init__ = init


def leave() -> None:
    """End the process; the interpreter's end is flaky with gloo."""
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
