"""One measurement a function; each runs in a process of its own and returns numbers."""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bases import Step, base, batch, device, prompted, training_step
from torch.profiler import ProfilerActivity, profile

LIBRARIES = ("hf_ptune", "peft", "base")


def seconds(step: Step) -> float:
    """CPU seconds of all threads, or seconds of the GPU's own events."""
    if device().type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def interleaved(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Medians, each step in turn, after one round that does not count; and medians of the rounds' ratios."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    result = {name: statistics.median(values) for name, values in times.items()}
    for over, under in (("peft", "hf_ptune"), ("hf_ptune", "base"), ("peft", "base")):
        if over in times and under in times:
            rounds = [a / b for a, b in zip(times[over], times[under], strict=True)]
            result[f"{over} / {under}"] = statistics.median(rounds)
    return result


def peak_bytes(step: Step) -> int:
    """Most bytes of tensors that a step holds beyond what was there before, by the allocator's own account."""
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def train(name: str, method: str, rows: int, length: int, virtual: int, **options: Any) -> dict[str, Any]:
    """Time of a training step, ours, PEFT's and the base's without a prompt in turn."""
    steps = {}
    for library in LIBRARIES:
        model = prompted(library, base(name), method, virtual)
        steps[library] = training_step(library, model, batch(model, rows, length, options.get("labelled")))
    result: dict[str, Any] = dict(interleaved(steps, options.get("repeats", 5)))
    if method == "prompt_tuning":
        result["tokens, peft / hf_ptune"] = (virtual + length) * rows / (virtual + length * rows)
    return result


def memory(
    name: str, method: str, rows: int, length: int, virtual: int, library: str, checkpointing: bool = False
) -> dict[str, Any]:
    """Peak bytes of a training step beyond weights and gradients."""
    model = prompted(library, base(name), method, virtual)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if library == "base":
            model.train()
    step = training_step(library, model, batch(model, rows, length))
    try:
        step()  # allocates gradients, and tries what is tried once
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"bytes": peak_bytes(step)}


def generate(name: str, method: str, rows: int, length: int, virtual: int, repeats: int = 5) -> dict[str, Any]:
    """Time of a prefill, and of a whole call of 32 new tokens."""
    models = {library: prompted(library, base(name), method, virtual).eval() for library in LIBRARIES}

    def call(model: Any, new: int) -> Any:
        inputs = batch(model, rows, length)
        return model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )

    result = {}
    for what, new in (("prefill", 1), ("whole call", 32)):
        steps: dict[str, Step] = {k: functools.partial(call, m, new) for k, m in models.items()}
        result[what] = interleaved(steps, repeats)
    return result


def long_prefix(name: str, rows: int, virtual: int, library: str) -> dict[str, Any]:
    """Bytes of keys and values after a prefill of 16 tokens behind a long prefix, and the most held on the way."""
    model = prompted(library, base(name), "p_tuning_v2", virtual).eval()
    inputs = {k: v for k, v in batch(model, rows, 16).items() if k != "labels"}
    kept: dict[str, Any] = {}

    @torch.no_grad()
    def step() -> None:
        kept["cache"] = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values

    step()
    kept.clear()
    peak = peak_bytes(step)
    layers = kept["cache"].layers
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    if library == "hf_ptune":
        held += sum(t.numel() * t.element_size() for p in model._injector.cached.value for t in p)
    return {"keys and values": held, "peak": peak}


def load(name: str, virtual: int) -> dict[str, Any]:
    """Time to put a saved adapter on a base in memory, ours and PEFT's in turn."""
    import peft

    from hf_ptune import PTuneForCausalLM

    bases = {library: base(name) for library in ("hf_ptune", "peft")}
    folders = {library: tempfile.mkdtemp() for library in bases}
    prompted("hf_ptune", bases["hf_ptune"], "p_tuning_v2", virtual).save_pretrained(folders["hf_ptune"], flatten=True)
    prompted("peft", base(name), "p_tuning_v2", virtual).save_pretrained(folders["peft"])

    def ours() -> None:
        PTuneForCausalLM.from_pretrained(folders["hf_ptune"], backbone=bases["hf_ptune"]).unwrap()

    def theirs() -> None:
        peft.PeftModel.from_pretrained(bases["peft"], folders["peft"])

    return dict(interleaved({"hf_ptune": ours, "peft": theirs}, 7))


def imports(repeats: int = 5) -> dict[str, float]:
    """What importing the package adds to importing transformers, CPU seconds in fresh processes."""
    program = (
        "import time; a = time.process_time(); import transformers; b = time.process_time(); import {}; "
        "print(b - a, time.process_time() - b)"
    )
    result = {}
    for package in ("hf_ptune", "peft"):
        runs = []
        for _ in range(repeats):
            command = [sys.executable, "-W", "ignore", "-c", program.format(package)]
            found = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
            runs.append([float(v) for v in found.stdout.split()])
        result["transformers"] = statistics.median(r[0] for r in runs)
        result[package] = statistics.median(r[1] for r in runs)
    return result


def whole_load(virtual: int, library: str) -> dict[str, Any]:
    """Peak resident memory of a process that loads a saved base, alone or by an adapter on it."""
    import resource

    from transformers import AutoModelForCausalLM

    folder = os.environ["PTUNE_BENCHMARK_BASE"]
    if library == "hf_ptune":
        folder = os.environ["PTUNE_BENCHMARK_ADAPTER"]
    import hf_ptune  # noqa: F401

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "memory": memory,
    "generate": generate,
    "long_prefix": long_prefix,
    "load": load,
    "imports": imports,
    "whole_load": whole_load,
}
