"""Try a prefix on every text family of transformers, and count what holds.

python recipes/benchmarks/coverage/sweep.py [--library hf_ptune|peft] [--task CAUSAL_LM|SEQ_CLS] [--families a,b]
"""

import argparse
import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))

from tiny import MAPPINGS, TASKS, VOCABULARY, tiny_model

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.errors import PTuneError

CHECKS = ("builds", "moves", "gradients", "checkpointing", "left", "right", "generate", "reload")
VIRTUAL = 4
SECONDS = 180


def ids(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    tokens = torch.randint(5, VOCABULARY - 5, (rows, length), generator=generator)
    tokens[:, -1] = 2  # encoder-decoders classify at the end-of-sequence token
    return tokens


def run(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        mask = torch.ones_like(tokens) if mask is None else mask
        return model(input_ids=tokens, attention_mask=mask).logits.float()


class Subject:
    """One family under one task, with a base on disk and a prompt around it."""

    def __init__(self, library: str, task: str, family: str, folder: str) -> None:
        self.library, self.task, self.family, self.folder = library, task, family, folder
        model = tiny_model(family, task)
        model.save_pretrained(f"{folder}/base")
        self.auto = TASKS[task]
        self.base = self.auto.from_pretrained(f"{folder}/base").float().eval()
        self.base_logits = run(self.base, ids(2, 7))

    def wrap(self) -> Any:
        backbone = self.auto.from_pretrained(f"{self.folder}/base").float().eval()
        torch.manual_seed(1)
        if self.library == "hf_ptune":
            model: Any = get_ptune_model(backbone, PTuneConfig(num_virtual_tokens=VIRTUAL))
            prompt = model.prompt
        else:
            import peft

            model = peft.get_peft_model(
                backbone, peft.PrefixTuningConfig(task_type=self.task, num_virtual_tokens=VIRTUAL)
            )
            prompt = model.prompt_encoder
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.normal_(0, 0.5)
        return model.eval()

    def adapter(self, model: Any) -> set[str]:
        if self.library == "hf_ptune":
            return model.adapter_parameter_names()
        return {n for n, p in model.named_parameters() if p.requires_grad}

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.task == "CAUSAL_LM" else torch.arange(len(tokens)) % 2

    # checks: True, None where the base itself cannot, or the reason why not -----------------------------------

    def moves(self) -> Any:
        found = run(self.model, ids(2, 7))
        if found.shape != self.base_logits.shape:
            return f"logits {tuple(found.shape)} instead of {tuple(self.base_logits.shape)}"
        return bool((found - self.base_logits).abs().max() > 1e-5) or "logits do not move"

    def _gradients(self, model: Any) -> dict[str, torch.Tensor | None]:
        model.train()
        model.zero_grad()
        tokens = ids(2, 7)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=self.labels(tokens)).loss.backward()
        model.eval()
        return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    def trains(self) -> bool:
        """Whether the base itself can take a training step on plain tokens."""
        try:
            self._gradients(copy.deepcopy(self.base))
        except Exception:  # a base that cannot says so in its own way
            return False
        return True

    def gradients(self) -> Any:
        if not self.trains():
            return None
        found, adapter = self._gradients(self.model), self.adapter(self.model)
        for name, gradient in found.items():
            if name in adapter and (gradient is None or not gradient.isfinite().all() or not gradient.abs().sum() > 0):
                return f"{name}: no gradient"
            if name not in adapter and gradient is not None:
                return f"{name}: a gradient in the backbone"
        return True

    def checkpointing(self) -> Any:
        if not self.base.supports_gradient_checkpointing or not self.trains():
            return None
        base = copy.deepcopy(self.base)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            self._gradients(base)
        except Exception:  # a base that cannot says so in its own way
            return None
        torch.manual_seed(3)
        plain = self._gradients(self.model)
        model = self.wrap()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found = self._gradients(model)
        for name in self.adapter(model):
            one, two = plain[name], found[name]
            if one is None or two is None or not torch.allclose(one, two, rtol=1e-4, atol=1e-5):
                return f"{name}: another gradient"
        return True

    def _padded(self, model: Any, side: str) -> float:
        tokens = ids(1, 5)
        pad = (3, 0) if side == "left" else (0, 3)
        alone = run(model, tokens)
        padded = run(model, torch.nn.functional.pad(tokens, pad), torch.nn.functional.pad(torch.ones_like(tokens), pad))
        if alone.dim() == 3 and self.task == "CAUSAL_LM":
            padded = padded[:, 3:] if side == "left" else padded[:, :5]
        return (alone - padded).abs().max().item() / max(alone.abs().max().item(), 1e-6)

    def padding(self, side: str) -> Any:
        if not self._padded(self.base, side) < 1e-3:
            return None
        off = self._padded(self.model, side)
        return off < 1e-3 or f"logits differ by {off:.1e}"

    def left(self) -> Any:
        return self.padding("left")

    def right(self) -> Any:
        return self.padding("right")

    def _decoded(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = step = ids(2, 7)
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
        for _ in range(5):
            step = torch.cat([step, run(model, step)[:, -1:].argmax(-1)], dim=1)
        return found, step

    def generate(self) -> Any:
        if self.task != "CAUSAL_LM":
            return None
        try:
            base = torch.equal(*self._decoded(self.base))
        except Exception:  # a base that cannot generate says so in its own way
            return None
        if not base:
            return None
        return torch.equal(*self._decoded(self.model)) or "generate differs from step-by-step decoding"

    def reload(self) -> Any:
        if self.library != "hf_ptune":
            import peft

            self.model.save_pretrained(f"{self.folder}/adapter")
            backbone = self.auto.from_pretrained(f"{self.folder}/base").float().eval()
            loaded: Any = peft.PeftModel.from_pretrained(backbone, f"{self.folder}/adapter").eval()
        else:
            self.model.save_pretrained(f"{self.folder}/adapter")
            loaded = self.auto.from_pretrained(f"{self.folder}/adapter").float()
        off = (run(loaded, ids(2, 7)) - run(self.model, ids(2, 7))).abs().max()
        return bool(off < 1e-5) or f"reloaded logits differ by {off:.1e}"


def reason(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"


def examine(job: tuple[str, str, str]) -> dict[str, Any]:
    """All checks of one family; an error of any kind is a result."""
    library, task, family = job
    result: dict[str, Any] = {"library": library, "task": task, "family": family}
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"over {SECONDS} s")))
    signal.alarm(SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = Subject(library, task, family, folder)
        except Exception as error:  # no tiny model: the family's own reason
            return result | {"unbuilt": reason(error)}
        try:
            subject.model = subject.wrap()
            result["builds"] = True
        except PTuneError as error:
            return result | {"refused": str(error)}
        except Exception as error:  # a defect, to be reported as one
            return result | {"builds": reason(error)}
        for name in CHECKS[1:]:
            check: Callable[[], Any] = getattr(subject, name)
            try:
                result[name] = check()
            except Exception as error:  # a defect, to be reported as one
                result[name] = reason(error)
    signal.alarm(0)
    return result


def verdict(row: dict[str, Any]) -> str:
    if "unbuilt" in row:
        return "unbuilt"
    if "refused" in row:
        return "refused"
    bad = [row.get(c, "not reached") for c in CHECKS if row.get(c, "not reached") not in (True, None)]
    if bad and all(str(b).startswith("InjectionError") for b in bad):
        return "refused"  # the condition is, by a clear error of ours
    return "fails" if bad else "passes"


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for task in MAPPINGS:
        chosen = [r for r in rows if r["task"] == task]
        if not chosen:
            continue
        counts = Counter(verdict(r) for r in chosen)
        held = {c: sum(r.get(c) in (True, None) for r in chosen if c in r) for c in CHECKS}
        summary = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()))
        lines += [f"## {task}: {len(chosen)} families, {summary}", ""]
        lines += ["| " + " | ".join(CHECKS) + " |", "|" + "---|" * len(CHECKS)]
        lines += ["| " + " | ".join(str(held[c]) for c in CHECKS) + " |", ""]
        lines += ["| family | verdict | what |", "|---|---|---|"]
        for row in sorted(chosen, key=lambda r: (verdict(r), r["family"])):
            bad = [f"{c}: {row[c]}" for c in CHECKS if row.get(c) not in (True, None)]
            what = row.get("unbuilt") or row.get("refused") or "; ".join(bad)
            lines.append(f"| {row['family']} | {verdict(row)} | {what.replace('|', '/').replace(chr(10), ' ')} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="hf_ptune", choices=["hf_ptune", "peft"])
    parser.add_argument("--task", choices=list(MAPPINGS))
    parser.add_argument("--families", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    tasks = [options.task] if options.task else list(MAPPINGS)
    jobs = [
        (options.library, task, family)
        for task in tasks
        for family in MAPPINGS[task]
        if not options.families or family in options.families.split(",")
    ]
    rows = []
    context = multiprocessing.get_context("fork")
    with context.Pool(options.jobs, maxtasksperchild=8) as pool:
        for row in pool.imap_unordered(examine, jobs):
            rows.append(row)
            bad = {c: row[c] for c in CHECKS if row.get(c, True) not in (True, None)}
            print(f"[{len(rows)}/{len(jobs)}] {row['task']} {row['family']}: {verdict(row)}", flush=True)
            for name, why in bad.items():
                print(f"      {name}: {why}", flush=True)
            for key in ("unbuilt", "refused"):
                if key in row:
                    print(f"      {row[key]}", flush=True)
    print(table(rows).split("| family")[0])
    if options.out:
        rows.sort(key=lambda r: (r["task"], r["family"]))
        (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "results.md").write_text(table(rows))


if __name__ == "__main__":
    main()
