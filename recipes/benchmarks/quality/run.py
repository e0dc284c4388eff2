"""Quality of hf_ptune beside PEFT's, beside trained heads alone, and beside full fine-tuning.

python recipes/benchmarks/quality/run.py [--missing] [--tasks trec,btc] [--columns p_tuning_v2,full] [--data FOLDER]

Every column chooses its setting on validation rows with seed 0 (rates first, then one change after the other), and
the chosen one runs with every seed; only then are test rows read. `--setting '{"lr": 2e-2, …}'` runs one setting.
Writes results.json after every run, and results.md, defaults.md and results.png of each budget at the end.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
RESULTS = HERE / "results.json"
Record = dict[str, Any]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PTUNE_DATA", str(HERE.parents[3] / "shared" / "data")))
    parser.add_argument("--tasks", default="", help="comma-separated; all of the budget when unset, as in tasks.py")
    parser.add_argument("--budget", choices=("short", "fresh", "long", "decoder"), default="short")
    parser.add_argument("--columns", default="", help="comma-separated; those that fit the task when unset")
    parser.add_argument("--only", default="", help="part of a run's key")
    parser.add_argument("--missing", action="store_true", help="run only what has no record yet")
    parser.add_argument("--setting", help="one setting as JSON, in place of the grid")
    parser.add_argument("--stage", choices=("all", "grid", "final"), default="all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16, for processors that are fast at it")
    parser.add_argument("--states", default=str(Path(tempfile.gettempdir()) / "ptune_quality"), help="trained tensors")
    parser.add_argument("--report", action="store_true", help="write the tables only")
    return parser.parse_args()


def key_of(task: str, column: str, setting: dict[str, Any], seed: int) -> str:
    """The name of a run."""
    return f"{task}/{column}/{json.dumps(setting, sort_keys=True)}/{seed}"


def read_records() -> dict[str, Record]:
    """All runs so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(key: str, record: Record) -> None:
    """Add a run to the records; several processes may do so."""
    with (HERE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read_records()
        records[key] = records.get(key, {}) | record
        aside = RESULTS.with_suffix(".new")
        aside.write_text(json.dumps(records, indent=1) + "\n")
        aside.replace(RESULTS)


class Runner:
    """Runs of one benchmark call: data are encoded once, records are looked up and kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded: dict[str, Any] = {}
        self.features: dict[tuple[str, str], Any] = {}
        Path(options.states).mkdir(parents=True, exist_ok=True)

    def data(self, name: str) -> Any:
        """Rows and tokenizer of a task."""
        import columns
        from tasks import TASKS, load

        if name not in self.loaded:
            tokenizer = columns.tokenizer_of(TASKS[name])
            self.loaded[name] = load(TASKS[name], Path(self.options.data), tokenizer), tokenizer
        return self.loaded[name]

    def run(self, name: str, column: str, setting: dict[str, Any], seed: int, test: bool = False) -> Record:
        """Train and validate one setting; with `test`, read the test rows too."""
        key = key_of(name, column, setting, seed)
        found = read_records().get(key)
        done = found is not None and (not test or "test" in found or "error" in found)
        if found is not None and (done and (self.options.missing or not test)):
            return found
        if self.options.only not in key:
            return found or {}
        try:
            record = self._measure(name, column, setting, seed, test, found)
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        record |= {"task": name, "column": column, "setting": setting, "seed": seed}
        keep(key, record)
        shown = {k: record.get(k) for k in ("validation", "test", "seconds", "error") if record.get(k) is not None}
        print(key, json.dumps(shown), flush=True)
        return record

    def _measure(
        self, name: str, column: str, setting: dict[str, Any], seed: int, test: bool, found: Record | None
    ) -> Record:
        import columns
        import torch
        from tasks import TASKS
        from training import evaluate, fit, keep_head_exact, steps_of

        task, how = TASKS[name], columns.COLUMNS[column]
        data, tokenizer = self.data(name)
        torch.manual_seed(seed)
        begin, cpu = time.perf_counter(), time.process_time()
        with contextlib.suppress(OSError):  # the peak of this run alone; not every kernel lets it be forgotten
            Path("/proc/self/clear_refs").write_text("5")
        model = columns.build(how, setting, task, data.labels, tokenizer)
        if self.options.bf16:
            keep_head_exact(model)
        splits = self._splits(name, column, model, data, tokenizer)
        path = (
            Path(self.options.states) / f"{hashlib.sha1(key_of(name, column, setting, seed).encode()).hexdigest()}.pt"
        )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        padding = tokenizer.pad_token_id or 0
        kept = torch.load(path) if found is not None and test and path.exists() else {}
        if kept.keys() == trained.keys():  # else a setting of that name trained something else then
            with torch.no_grad():
                for n, tensor in kept.items():
                    trained[n].copy_(tensor)
            return {"test": self._test(model, task, splits, data, tokenizer, self.options.bf16)}
        figures: list[float] = []
        losses: list[float] = []

        def after(epoch: int, loss: float) -> None:
            figures.append(evaluate(model, task, splits["validation"], data, padding, self.options.bf16))
            losses.append(loss)
            print(f"  epoch {epoch}: loss {loss:.3f}, validation {figures[-1]:.3f}", flush=True)

        fit(model, task, splits["train"], setting, seed, padding, after, self.options.bf16)
        record: Record = {
            "validation": [round(f, 4) for f in figures],
            "loss": [round(x, 4) for x in losses],
            "steps": steps_of(task, data.train, setting),
            "parameters": sum(p.numel() for p in trained.values()),
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_rss_mib": _peak(),
        }
        if columns.DEVICE.type == "cuda":
            record["device"] = torch.cuda.get_device_name()
        elif self.options.bf16:
            record["device"] = "CPU, products in bfloat16"
        if test:
            record["test"] = self._test(model, task, splits, data, tokenizer, self.options.bf16)
        elif not column.startswith("head"):
            torch.save({n: p.detach() for n, p in trained.items()}, path)
        return record

    def _splits(self, name: str, column: str, model: Any, data: Any, tokenizer: Any) -> dict[str, Any]:
        from training import freeze_features

        rows = {"train": data.train, "validation": data.validation, "test": data.test}
        if not column.startswith("head"):
            return rows
        if (name, column) not in self.features:
            padding = tokenizer.pad_token_id or 0
            self.features[name, column] = {s: freeze_features(model, r, padding) for s, r in rows.items()}
        return self.features[name, column]

    @staticmethod
    def _test(model: Any, task: Any, splits: dict[str, Any], data: Any, tokenizer: Any, lower: bool) -> Any:
        from tasks import bleu
        from training import evaluate, write_answers

        padding = tokenizer.pad_token_id or 0
        figure = round(evaluate(model, task, splits["test"], data, padding, lower), 4)
        if task.kind != "CAUSAL_LM" or task.folder == "alpaca_zh":
            return figure
        written = write_answers(model, splits["test"], padding, tokenizer)
        return [figure, round(bleu(written, [r["truth"]["references"] for r in splits["test"]]), 2)]

    def grid(self, name: str, column: str) -> dict[str, Any] | None:
        """Choose a column's setting on validation, rates first, then one change after the other."""
        import columns
        from tasks import TASKS

        task, how = TASKS[name], columns.COLUMNS[column]
        start = dict(how.defaults or {}) if task.kind != "CAUSAL_LM" else {}
        if how.library in ("peft", "hf_ptune") and how.method not in ("lora", "bitfit"):
            start = {"length": task.virtual[0]} | start
        best = self._best(name, column, [start | {"lr": rate} for rate in how.rates_for(task)])
        further = [{"length": n} for n in task.virtual[1:]] if "length" in start else []
        for change in [*further, *how.further]:
            if best is not None:
                best = self._best(name, column, [best, best | change])
        return best

    def _best(self, name: str, column: str, settings: list[dict[str, Any]]) -> dict[str, Any] | None:
        tried = [(self.run(name, column, s, 0), s) for s in settings]
        scored = [(r["validation"][-1], s) for r, s in tried if r.get("validation")]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    def column(self, name: str, column: str) -> None:
        """All runs of a column on a task."""
        seeds = [int(s) for s in self.options.seeds.split(",")]
        if self.options.setting:
            setting = json.loads(self.options.setting)
            for seed in seeds:
                self.run(name, column, setting, seed, self.options.stage == "final")
            return
        best = self.grid(name, column)
        if best is not None and self.options.stage != "grid":
            for seed in seeds:
                self.run(name, column, best, seed, test=True)


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024)


def fitting(name: str) -> list[str]:
    """The columns that a task has."""
    from columns import COLUMNS
    from tasks import TASKS

    if TASKS[name].kind == "CAUSAL_LM":
        return ["peft_prompt_tuning", "prompt_tuning", "peft_prefix", "prefix_tuning", "p_tuning_v2", "lora"]
    rows = TASKS[name].kind == "SEQ_CLS"
    if TASKS[name].base == "smollm2":
        usual = ["head_mean", "peft_prompt_tuning", "prompt_tuning", "peft_prefix", "p_tuning_v2", "lora", "full"]
        return usual if rows else [*usual, "full_window"]
    return [c for c in COLUMNS if c not in ("lora", "full_window" if rows else "head_mean")]


def main() -> None:
    options = parse()
    import report
    import torch
    import transformers
    from tasks import TASKS

    if options.report:
        report.write(read_records(), HERE)
        return
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing changes on a CPU
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    runner = Runner(options)
    every = [name for name, task in TASKS.items() if task.budget == options.budget]
    for name in options.tasks.split(",") if options.tasks else every:
        for column in options.columns.split(",") if options.columns else fitting(name):
            if column in fitting(name):
                runner.column(name, column)
    report.write(read_records(), HERE)


if __name__ == "__main__":
    main()
