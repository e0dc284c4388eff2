"""Try a prompt on every text family of transformers, and count what holds.

python recipes/benchmarks/coverage/sweep.py [--library hf_ptune|peft] [--task causal|seqcls|both] [--families a,b]
"""

import argparse
import functools
import inspect
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny import AUTO_CLASSES, CAUSAL, EOS, FAMILY_NAMES, LABELS, PAD, PLACEHOLDERS, SEQCLS, VOCABULARY, tiny_model

CHECKS = ("builds", "moves", "gradients", "checkpointing", "left", "right", "generate", "reload")
TASK_NAMES = {CAUSAL: "causal language models", SEQCLS: "sequence classifiers"}
VIRTUAL_TOKENS, NEW_TOKENS, SECONDS, MEMORY = 4, 5, 120, 12 << 30
NA, REFUSED, WRONG = "n/a: ", "refused: ", "wrong: "
Logits, Gradients = torch.Tensor, dict[str, torch.Tensor | None]


class NotApplicable(Exception):
    """Raised when the base itself lacks what a check asks of it."""


def tokens(rows: int, length: int) -> torch.Tensor:
    """Fixed token ids without special tokens, but for a last <eos>, which BART's and T5's classifiers ask for."""
    generator = torch.Generator().manual_seed(10 * rows + length)
    drawn = torch.randint(5, VOCABULARY - PLACEHOLDERS, (rows, length), generator=generator)
    drawn[:, -1] = EOS
    return drawn


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether a base's forward takes an argument by name."""
    return name in inspect.signature(model.forward).parameters


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


class Subject:
    """One family under one task: its base on disk, and the same base with a prompt."""

    def __init__(self, library: str, task: str, family: str, folder: Path) -> None:
        self.library, self.task, self.folder, self.auto = library, task, folder, AUTO_CLASSES[task]
        tiny_model(family, self.auto).save_pretrained(folder / "base")
        self.base = self.load_base()
        self.expected = self.run(self.base, tokens(2, 7))
        self.same = torch.equal(self.expected, self.run(self.base, tokens(2, 7)))

    def load_base(self) -> PreTrainedModel:
        model: PreTrainedModel = self.auto.from_pretrained(self.folder / "base", dtype=torch.float32).eval()
        if getattr(model.config, "model_type", "") == "xmod":
            model.set_default_language(model.config.languages[0])
        if getattr(model, "generation_config", None) is not None:
            # without <eos>, forced or suppressed tokens: nothing but the logits decides
            model.generation_config = GenerationConfig(pad_token_id=PAD)
        return model

    def wrap(self) -> Any:
        """The base with a prompt of noticeable weight."""
        backbone = self.load_base()
        torch.manual_seed(1)
        if self.library == "hf_ptune":
            from hf_ptune import PTuneConfig, get_ptune_model

            model: Any = get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=VIRTUAL_TOKENS))
            prompt = model.prompt
        else:
            from peft import PrefixTuningConfig, TaskType, get_peft_model

            kind = TaskType.CAUSAL_LM if self.task == CAUSAL else TaskType.SEQ_CLS
            model = get_peft_model(backbone, PrefixTuningConfig(task_type=kind, num_virtual_tokens=VIRTUAL_TOKENS))
            prompt = model.prompt_encoder
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.normal_(0, 0.5)
        return model.eval()

    def reload(self, folder: Path) -> Any:
        if self.library == "hf_ptune":
            return self.auto.from_pretrained(folder).eval()
        from peft import PeftModel

        return PeftModel.from_pretrained(self.load_base(), folder).eval()

    def run(self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any) -> Logits:
        mask = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, **inputs).logits
        return logits

    def train(self, model: Any) -> tuple[torch.Tensor, Gradients]:
        """Loss and gradients of one training step."""
        ids = tokens(2, 7)
        labels = ids if self.task == CAUSAL else torch.arange(len(ids)) % LABELS
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        model.eval()
        return loss.detach(), {n: p.grad if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    def adapter(self, model: Any) -> set[str]:
        if self.library == "hf_ptune":
            names: set[str] = model.adapter_parameter_names()
            return names
        return {n for n, p in model.named_parameters() if p.requires_grad}

    def of_base(self, what: str, function: Callable[[], bool]) -> None:
        """Go on only where the base passes a check of its own.

        Raises:
            NotApplicable: the base does not.
        """
        if not self.same:
            raise NotApplicable("the base gives other logits every time")
        try:
            holds = function()
        except Exception as error:  # families raise errors of any kind where they cannot do a thing
            raise NotApplicable(f"the base cannot {what} ({reason(error)})") from error
        if not holds:
            raise NotApplicable(f"the base does not {what}")


def moves(subject: Subject) -> str | None:
    found = subject.run(subject.model, tokens(2, 7))
    if found.shape != subject.expected.shape:
        return f"logits {tuple(found.shape)}, the base has {tuple(subject.expected.shape)}"
    if not found.isfinite().all():
        return "logits are not finite"
    if torch.equal(found, subject.run(subject.model, tokens(2, 7))) is not subject.same:
        return "other logits at the second call"
    return None if distance(found, subject.expected) > 1e-5 else "the prompt does not move the logits"


def gradients(subject: Subject) -> str | None:
    subject.of_base("train", lambda: bool(subject.train(subject.base)[0].isfinite()))
    _, found = subject.train(subject.model)
    adapter = subject.adapter(subject.model)
    for name, gradient in found.items():
        if name not in adapter:
            if gradient is not None:
                return f"{name} is of the backbone and gets a gradient"
        elif gradient is None or not gradient.isfinite().all() or not gradient.any():
            return f"{name} gets {'no' if gradient is None else 'a zero or infinite'} gradient"
        elif subject.library == "hf_ptune" and name == "prompt.weight" and not (used := gradient.any(0)).all():
            return f"{int((~used).sum())} of {len(used)} columns of the prefix get no gradient"
    return None


def _same_step(one: tuple[torch.Tensor, Gradients], two: tuple[torch.Tensor, Gradients], names: set[str]) -> str | None:
    if not distance(one[0], two[0]) < 1e-5:
        return f"loss {one[0]:.6f} instead of {two[0]:.6f}"
    for name in sorted(names):
        found, expected = one[1][name], two[1][name]
        if expected is None and found is None:
            continue
        if expected is None or found is None or not distance(found, expected) < 1e-5:
            off = "no" if found is None or expected is None else f"{distance(found, expected):.1e} off"
            return f"gradient of {name}: {off}"
    return None


def checkpointing(subject: Subject) -> str | None:
    if not subject.base.supports_gradient_checkpointing:
        raise NotApplicable("the base does not support gradient checkpointing")
    options = {"use_reentrant": False}

    def base_does() -> bool:
        base = subject.load_base()
        plain = subject.train(base)
        base.gradient_checkpointing_enable(options)
        return _same_step(subject.train(base), plain, {n for n, _ in base.named_parameters()}) is None

    subject.of_base("train the same under gradient checkpointing", base_does)
    plain, model = subject.train(subject.model), subject.wrap()
    model.gradient_checkpointing_enable(options)
    if not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return "no module checkpoints"
    return _same_step(subject.train(model), plain, subject.adapter(model))


def _padding_error(subject: Subject, model: Any, left: bool, positions: bool) -> float:
    ids, mask, pad = tokens(1, 5), torch.ones(1, 5, dtype=torch.long), (3, 0) if left else (0, 3)
    own = torch.arange(5)[None]
    alone = subject.run(model, ids, **({"position_ids": own} if positions else {}))
    padded = subject.run(
        model,
        torch.nn.functional.pad(ids, pad, value=PAD),
        torch.nn.functional.pad(mask, pad),
        **({"position_ids": torch.nn.functional.pad(own, pad)} if positions else {}),
    )
    if subject.task == CAUSAL:
        padded = padded[:, -5:] if left else padded[:, -8:-3]
        alone = alone[:, -5:]
    return distance(padded, alone)


def _padding(subject: Subject, left: bool) -> str | None:
    ways = [False, True] if accepts(subject.base, "position_ids") else [False]
    tried: list[str] = []
    failed: list[str] = []
    for positions in ways:
        try:
            side = "left" if left else "right"
            off = _padding_error(subject, subject.base, left, positions)
            if not (subject.same and off < 5e-5):
                failed.append(f"{off:.1e} off")
                continue
        except Exception as error:  # families raise errors of any kind where they cannot do a thing
            failed.append(reason(error))
            continue
        off = _padding_error(subject, subject.model, left, positions)
        tried.append("" if off < 1e-4 else f"{side} padding{', position_ids' * positions}: logits {off:.1e} off")
    if not tried:
        raise NotApplicable(f"padding changes the base too ({failed[-1]})")
    return "; ".join(filter(None, tried)) or None


def left(subject: Subject) -> str | None:
    return _padding(subject, True)


def right(subject: Subject) -> str | None:
    return _padding(subject, False)


def _cached(model: Any, ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
    )
    return found


def _stepwise(subject: Subject, model: Any, ids: torch.Tensor) -> torch.Tensor:
    # PEFT hands its prefix over in the cache
    inputs = {"use_cache": False} if accepts(subject.base, "use_cache") and subject.library == "hf_ptune" else {}
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, subject.run(model, ids, **inputs)[:, -1:].argmax(-1)], dim=1)
    return ids


def _base_agrees(subject: Subject, ids: torch.Tensor, decode: Callable[[Any], torch.Tensor]) -> bool:
    return torch.equal(_cached(subject.base, ids), decode(subject.base))


def generate(subject: Subject) -> str | None:
    """Greedy decoding with a cache is that by full forwards, or, where generate numbers positions in a way of its
    own (RoBERTa), that of generate without a cache."""
    if subject.task != CAUSAL:
        raise NotApplicable("a classifier")
    ids = tokens(2, 7)
    ids[:, -1] = 7  # no <eos> amid the text
    ways: dict[str, Callable[[Any], torch.Tensor]] = {
        "full forwards": lambda model: _stepwise(subject, model, ids),
        "generate without a cache": lambda model: _cached(model, ids, use_cache=False),
    }
    for way, decode in ways.items():
        try:
            agree = functools.partial(_base_agrees, subject, ids, decode)
            subject.of_base(f"generate like {way}", agree)
        except NotApplicable as error:
            missing = error
            continue
        found, expected = _cached(subject.model, ids), decode(subject.model)
        same = torch.equal(found, expected)
        return None if same else f"generate {found[:, 7:].tolist()}, {way} {expected[:, 7:].tolist()}"
    raise missing


def reload(subject: Subject) -> str | None:
    if not subject.same:
        raise NotApplicable("the base gives other logits every time")
    subject.model.save_pretrained(subject.folder / "adapter")
    expected = subject.run(subject.model, tokens(2, 7))
    off = distance(subject.run(subject.reload(subject.folder / "adapter"), tokens(2, 7)), expected)
    return None if off < 1e-6 else f"logits {off:.1e} off"


TESTS: dict[str, Callable[[Subject], str | None]] = {
    f.__name__: f for f in (moves, gradients, checkpointing, left, right, generate, reload)
}


def reason(error: BaseException) -> str:
    """The last line of a traceback, and where it was raised."""
    places = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(p.filename).name}:{p.lineno}" for p in reversed(places[-3:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:220]} ({where})"


def examine(library: str, task: str, family: str) -> Iterator[dict[str, Any]]:
    """All checks of one family, a finding at a time; an error of any kind is a finding."""
    refusal: tuple[type[Exception], ...] = ()
    if library == "hf_ptune":
        from hf_ptune.errors import PTuneError

        refusal = (PTuneError,)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = Subject(library, task, family, Path(folder))
        except Exception as error:  # no tiny model: the family's own reason
            yield {"unbuilt": reason(error)}
            return
        yield {"class": type(subject.base).__name__}
        try:
            subject.model = subject.wrap()
            yield {"builds": True}
        except refusal as error:
            yield {"builds": REFUSED + " ".join(str(error).split())}
            return
        except Exception as error:  # a defect of the library, to be reported as one
            yield {"builds": WRONG + reason(error)}
            return
        for name, test in TESTS.items():
            try:
                wrong = test(subject)
                yield {name: True if wrong is None else WRONG + wrong}
            except NotApplicable as error:
                yield {name: NA + str(error)}
            except refusal as error:
                yield {name: REFUSED + " ".join(str(error).split())}
            except Exception as error:  # a defect of the library, to be reported as one
                yield {name: WRONG + reason(error)}


def work(job: tuple[str, str, str], results: Connection) -> None:
    """Body of one worker process: silent, bounded in memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    for finding in examine(*job):
        results.send(finding)
    results.close()


def sweep(jobs: list[tuple[str, str, str]], workers: int) -> Iterator[dict[str, Any]]:
    """Examine families, each in a process of its own, so that a crash or a hang stays its own."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(job, theirs))
            process.start()
            theirs.close()
            row = dict(zip(("library", "task", "family"), job, strict=True))
            running[mine] = (process, time.monotonic() + SECONDS, row)
        wait(list(running), timeout=1)
        for pipe, (process, deadline, row) in list(running.items()):
            ended = False
            try:
                while pipe.poll():
                    row |= pipe.recv()
            except EOFError:
                ended = True
            late = time.monotonic() > deadline
            if not (ended or late):
                continue
            process.kill() if late else process.join()
            missing = next((c for c in CHECKS if c not in row), None)
            if "unbuilt" not in row and missing and row.get("builds", True) is True:
                row[missing] = WRONG + (f"over {SECONDS} s" if late else f"the process died ({process.exitcode})")
            if "class" not in row and "unbuilt" not in row:
                row["unbuilt"] = row.pop("builds", "")
            del running[pipe]
            yield row


def verdict(row: dict[str, Any]) -> str:
    """passes | refused (at construction) | refused in use | wrong | unbuilt (no tiny base)."""
    if "unbuilt" in row:
        return "unbuilt"
    found = [str(row.get(c, WRONG)) for c in CHECKS]
    if found[0].startswith(REFUSED):
        return "refused"
    if any(f.startswith(WRONG) for f in found):
        return "wrong"
    return "refused in use" if any(f.startswith(REFUSED) for f in found) else "passes"


def sign(finding: Any) -> str:
    text = str(finding)
    return "yes" if finding is True else "n/a" if text.startswith(NA) else text.split(":")[0].replace("None", "")


def markdown(rows: list[dict[str, Any]]) -> str:
    """A summary, then a table of every family and what it failed, by library and task."""
    lines = ["# Coverage of the text families of transformers", ""]
    groups = [(lib, task) for lib in ("hf_ptune", "peft") for task in TASK_NAMES]
    chosen = {g: [r for r in rows if (r["library"], r["task"]) == g] for g in groups}
    lines += [f"| library | families | built | passes all | refused | refused in use | wrong | {' | '.join(CHECKS)} |"]
    lines += ["|" + "---|" * (7 + len(CHECKS))]
    for (library, task), group in chosen.items():
        if group:
            built = [r for r in group if "unbuilt" not in r]
            counts = Counter(map(verdict, built))
            kinds = ("passes", "refused", "refused in use", "wrong")
            held = [sum(sign(r.get(c)) in ("yes", "n/a") for r in built) for c in CHECKS]
            cells = [f"{library}, {TASK_NAMES[task]}", len(group), len(built), *(counts[k] for k in kinds), *held]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "The columns of checks count families where it holds or the base itself lacks the thing (n/a).", ""]
    for (library, task), group in chosen.items():
        if not group:
            continue
        lines += [f"## {library}: {TASK_NAMES[task]}", "", f"| family | verdict | {' | '.join(CHECKS)} | why |"]
        lines += ["|" + "---|" * (3 + len(CHECKS))]
        for row in sorted(group, key=lambda r: r["family"]):
            bad = [f"{c}: {row[c]}" for c in CHECKS if str(row.get(c)).startswith((WRONG, REFUSED))]
            why = (row.get("unbuilt") or "; ".join(bad)).replace("|", "/")
            cells = [row["family"], verdict(row), *(sign(row.get(c)) for c in CHECKS), why]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Put rows into a JSON file, in place of older ones of the same family, and write the table beside it."""
    older = json.loads(path.read_text()) if path.exists() else []
    key = lambda r: (r["library"], r["task"], r["family"])  # noqa: E731
    merged = sorted(({key(r): r for r in older} | {key(r): r for r in rows}).values(), key=key)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(merged))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="hf_ptune", choices=["hf_ptune", "peft"])
    parser.add_argument("--task", default="both", choices=[CAUSAL, SEQCLS, "both"])
    parser.add_argument("--families", default="", help="names, with commas between; all of them when empty")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file that keeps the results; the table is written beside it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    __import__(options.library)  # once, before the workers fork
    tasks = list(TASK_NAMES) if options.task == "both" else [options.task]
    wanted = set(filter(None, options.families.split(",")))
    jobs = [(options.library, t, f) for t in tasks for f in FAMILY_NAMES[t] if not wanted or f in wanted]
    rows = []
    for row in sweep(jobs, options.jobs):
        rows.append(row)
        print(f"[{len(rows)}/{len(jobs)}] {row['task']} {row['family']}: {verdict(row)}", flush=True)
        for name in ("unbuilt", *CHECKS):
            if (name == "unbuilt" and name in row) or str(row.get(name)).startswith((WRONG, REFUSED)):
                print(f"    {name}: {row[name]}", flush=True)
    print(markdown(rows).split("\n## ")[0])
    if options.json:
        keep(rows, options.json)


if __name__ == "__main__":
    main()
