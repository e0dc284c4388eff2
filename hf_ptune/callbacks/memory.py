"""Report memory by what holds it, step time and tokens per second, in the Trainer's own log."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ptune.callbacks.numbers import NumbersCallback
from hf_ptune.cards import ends_training
from hf_ptune.errors import PTuneError
from hf_ptune.modeling_ptune import PTunePreTrainedModel

_MIB = 1024 * 1024
_PER_RANK = ("device_allocated", "device_reserved", "device_peak", "rss", "rss_peak")
_ROWS = {
    "device_allocated": "device, allocated",
    "device_reserved": "device, reserved",
    "device_peak": "device, peak",
    "rss": "process, resident",
    "rss_peak": "process, peak resident",
    "backbone": "backbone",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take on this rank; a sharded tensor counts its own shard."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local if t.device.type != "meta")


def process_bytes() -> tuple[int, int]:
    """Resident memory of this process, now and at its peak, in bytes."""
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return info.rss, info.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return info.rss, max(info.rss, peak if sys.platform == "darwin" else peak * 1024)


def parameter_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the backbone's parameters and buffers, and of the adapter's, on this rank."""
    if isinstance(model, PTunePreTrainedModel):
        names = model.adapter_parameter_names()
    else:
        names = {n for n, p in model.named_parameters() if p.requires_grad}
    adapter = tensor_bytes(p for n, p in model.named_parameters() if n in names)
    everything = tensor_bytes(model.parameters()) + tensor_bytes(model.buffers())
    return {"backbone": everything - adapter, "adapter": adapter}


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in an optimizer's state on this rank."""
    states = [] if optimizer is None else list(optimizer.state.values())
    return tensor_bytes(v for s in states if isinstance(s, dict) for v in s.values() if isinstance(v, Tensor))


def count_tokens(kwargs: dict[str, Any]) -> Tensor | int:
    """Tokens of a batch that are not padding: the sum of a mask `[B, S]`, else B * S; with choices, `[B, C, S]`."""
    ids, embeddings, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    # a mask of more dimensions than its tokens says who attends to whom
    dims = ids.dim() if isinstance(ids, Tensor) else embeddings.dim() - 1 if isinstance(embeddings, Tensor) else 2
    if isinstance(mask, Tensor) and mask.dim() == dims:
        return mask.detach().sum()
    if isinstance(ids, Tensor):
        return ids.numel()
    return embeddings.shape[:-1].numel() if isinstance(embeddings, Tensor) else 0


@dataclass(frozen=True)
class _Interval:
    """What one rank measured between two logs: MiB by key, update steps, their seconds, and tokens."""

    memory: dict[str, float]
    steps: int
    seconds: float
    tokens: int

    def speed(self) -> dict[str, float]:
        speed = {"step_time_s": self.seconds / max(self.steps, 1)}
        if self.tokens and self.seconds:
            speed["tokens_per_second"] = self.tokens / self.seconds
        return speed


class MemoryCallback(NumbersCallback):
    """Add memory, step time and tokens per second to the Trainer's training logs; print a table at the end.

    Keys are `mem_<what>_mib` (MiB, the maximum over ranks), with more than one rank also
    `mem_<what>_mib_rank<r>`, `step_time_s` (seconds of forward, backward and update, the slowest rank,
    without data loading, evaluation and saving) and `tokens_per_second` (all ranks; padding is left out
    where a mask tells it, and where `include_num_input_tokens_seen` is set the Trainer's own count is used;
    absent under torch.compile without it). Activations are the device's peak without everything else that
    was measured; on a CPU nothing tells them, so the key is absent. The device's peak counts from the start
    of training, gradients are the most that an update found.

    Args:
        every: "log" adds the numbers to every training log; "epoch" to a log at the end of every epoch. The
            log that ends training has them too.

    Raises:
        PTuneError: another value of `every`.

    Attributes:
        summary: after training, the largest of each memory number in MiB, mean `step_time_s` and
            `tokens_per_second`, `world_size`, `device`, and `per_rank`, one dict of memory numbers a rank.
    """

    def __init__(self, every: str = "log") -> None:
        if every not in ("log", "epoch"):
            raise PTuneError(f'MemoryCallback(every={every!r}); expected "log" or "epoch".')
        self.every = every
        self.summary: dict[str, Any] = {}
        self._hook: Any = None
        self._begin()

    def _begin(self) -> None:
        self._devices: list[torch.device] = []
        self._gradients = 0
        self._started: float | None = None
        self._steps, self._seconds = 0, 0.0
        self._tokens: Tensor | int = 0
        self._seen = 0
        self._due = False
        self._total = _Interval({}, 0, 0.0, 0)
        self._peaks: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting."""
        model = extract_model_from_parallel(kwargs["model"], keep_torch_compile=False)
        self._begin()
        self._seen = state.num_input_tokens_seen
        self._devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._unhook()
        # a hook that changes a number of ours would be traced, and retraced, by a compiled model
        if args.include_num_input_tokens_seen == "no" and not args.torch_compile:
            self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure gradients while they exist."""
        gradients = tensor_bytes(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        self._gradients = max(self._gradients, gradients)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock; ask for a log at the end of an epoch."""
        if self._started is not None:
            self._steps += 1
            self._seconds += time.perf_counter() - self._started
            self._started = None
        if self.every == "log":
            self._due = True
        elif state.epoch is not None and state.epoch == int(state.epoch):
            self._due = control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the numbers to a training log; evaluation logs and logs of the user's own are left alone."""
        logs: dict[str, Any] = kwargs["logs"]
        last = ends_training(logs)
        # both kinds come from the Trainer, which logs on every rank: gathering cannot wait for a rank forever
        if not last and not (self._due and "loss" in logs and "learning_rate" in logs):
            return
        self._due = False
        numbers = self._numbers(args, state, kwargs["model"], kwargs.get("optimizer"), last)
        self.add_numbers(logs, state, numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the table on the first rank of all."""
        self._unhook()
        if self.summary and state.is_world_process_zero:
            tqdm.write(self.table())

    def table(self) -> str:
        """The summary as aligned plain text; empty before training."""
        if not self.summary:
            return ""
        ranks = self.summary["per_rank"]
        heads = ["max"] + ([f"rank {r}" for r in range(len(ranks))] if len(ranks) > 1 else [])
        rows = [["MiB", *heads]]
        for key, title in _ROWS.items():
            if key in self.summary:
                each = ranks if len(ranks) > 1 else []
                rows.append([title, f"{self.summary[key]:.2f}", *(f"{r[key]:.2f}" for r in each)])
        if "activations" not in self.summary:
            rows.append(["activations", "not told on CPU"])
        rows.append(["step time, ms", f"{1000 * self.summary['step_time_s']:.1f}"])
        if "tokens_per_second" in self.summary:
            rows.append(["tokens per second", f"{self.summary['tokens_per_second']:.0f}"])
        first = max(len(row[0]) for row in rows)
        other = max(len(cell) for row in rows for cell in row[1:])
        return "\n".join("  ".join([r[0].ljust(first), *(c.rjust(other) for c in r[1:])]) for r in rows)

    def _numbers(
        self, args: TrainingArguments, state: TrainerState, model: Any, optimizer: Any, last: bool
    ) -> dict[str, float]:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        memory = {k: v / _MIB for k, v in self._memory(inner, optimizer).items()}
        own = _Interval(memory, self._steps, self._seconds, int(self._tokens))
        ranks: list[_Interval] = gather_object([own]) if args.world_size > 1 else [own]
        seconds, tokens = max(r.seconds for r in ranks), sum(r.tokens for r in ranks)
        if args.include_num_input_tokens_seen != "no":
            seen = int(state.num_input_tokens_seen)
            tokens, self._seen = seen - self._seen, seen
        self._total = _Interval(
            {}, self._total.steps + self._steps, self._total.seconds + seconds, self._total.tokens + tokens
        )
        speed = (self._total if last else _Interval({}, self._steps, seconds, tokens)).speed()
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        memories = [r.memory for r in ranks]
        self._remember(memories, args)
        numbers = {f"mem_{k}_mib": max(m[k] for m in memories) for k in memory}
        if len(memories) > 1:
            each = [(r, k) for r in range(len(memories)) for k in _PER_RANK if k in memory]
            numbers |= {f"mem_{k}_mib_rank{r}": memories[r][k] for r, k in each}
        return {k: round(v, 4) for k, v in numbers.items()} | speed

    def _memory(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        rss, rss_peak = process_bytes()
        found = {"rss": rss, "rss_peak": rss_peak}
        found |= parameter_bytes(model)
        found |= {"gradients": self._gradients, "optimizer": optimizer_bytes(optimizer)}
        if self._devices:
            told = sum(found[k] for k in ("backbone", "adapter", "gradients", "optimizer"))
            peak = sum(torch.cuda.max_memory_allocated(d) for d in self._devices)
            found["device_allocated"] = sum(torch.cuda.memory_allocated(d) for d in self._devices)
            found["device_reserved"] = sum(torch.cuda.memory_reserved(d) for d in self._devices)
            found |= {"device_peak": peak, "activations": max(0, peak - told)}
        return found

    def _remember(self, memories: list[dict[str, float]], args: TrainingArguments) -> None:
        before = self._peaks or memories
        self._peaks = [{k: max(v, b.get(k, v)) for k, v in m.items()} for m, b in zip(memories, before, strict=True)]
        device = torch.cuda.get_device_name(self._devices[0]) if self._devices else args.device.type
        self.summary = {k: max(m[k] for m in self._peaks) for k in self._peaks[0]}
        self.summary |= self._total.speed()
        self.summary |= {"world_size": len(memories), "device": device, "per_rank": self._peaks}

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._started is not None:  # neither evaluation nor another callback's forward pass
            named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
            self._tokens = self._tokens + count_tokens(named)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
