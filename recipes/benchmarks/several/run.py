"""One prompt for three corpora of entities beside one for each: the small variant of several/entities_p_tuning_v2.yaml.

python recipes/benchmarks/several/run.py [--seeds 0,1,2] [--runs apart,together,adapted]

Runs, each of three epochs of 994, 1,200 and 1,200 rows on MiniLM, all with the same rate, length and batch:
`apart`, a prompt a corpus; `together`, one prompt for the three with a head each; `adapted`, each corpus by itself for
three epochs more, from prompt and head that `together` left; `longer`, a prompt a corpus for six epochs. What heads
read and the base's dropout are left to the defaults, which go by epochs: in `longer` heads read the last layer, beside
the base's dropout, in all others a mix of all layers, without it; so that `longer` tells of more than its epochs.
Writes results.json after every run, and results.md at the end. Rows are read from recipes/data/<corpus>.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = HERE / "results.json"
TASKS = ("wikigold", "btc", "wnut17")
_EPOCHS = {"apart": 3, "together": 3, "adapted": 3, "longer": 6}
Record = dict[str, Any]


def records() -> dict[str, Record]:
    """All runs so far, by `run/corpus/seed`."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(key: str, record: Record) -> None:
    """Add a run to the records."""
    RESULTS.write_text(json.dumps(dict(sorted((records() | {key: record}).items())), indent=1) + "\n")


def train(module: str, recipe: str, *overrides: str) -> None:
    """Train a recipe's small variant in a process of its own."""
    command = [sys.executable, "-m", module, str(ROOT / "recipes" / recipe), "--variant=small", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def told(adapter: Path) -> Record:
    """Held-out and test F1 of a finished adapter."""
    from hf_ptune.cards import RunFacts

    metrics = RunFacts.load(adapter).metrics[0]
    return {"f1": round(metrics["f1"], 4), "test_f1": round(metrics["test_f1"], 4)}


def run(kind: str, seed: int, folder: Path) -> None:
    """Train one kind of run on all corpora."""
    same = [f"--seed={seed}", f"--training.num_train_epochs={_EPOCHS[kind]}", "--training.eval_strategy=no"]
    if kind == "together":
        if f"together/{TASKS[0]}/{seed}" not in records():
            begin, out = time.perf_counter(), folder / f"together-{seed}"
            train("hf_ptune.train_multitask", "several/entities_p_tuning_v2.yaml", *same, f"--output_dir={out}")
            minutes = round((time.perf_counter() - begin) / 60, 1)
            for task in TASKS:
                keep(f"together/{task}/{seed}", told(out / "adapter" / task) | {"minutes": minutes})
        return
    for task in TASKS:
        if f"{kind}/{task}/{seed}" in records():
            continue
        begin, out = time.perf_counter(), folder / f"{kind}-{task}-{seed}"
        start = {
            "prompt_tuning_init": "ADAPTER",
            "prompt_tuning_init_adapter": str(folder / f"together-{seed}" / "adapter" / task),
            "prompt_tuning_init_head": "true",
        }
        further = [f"--options.{name}={value}" for name, value in start.items()] if kind == "adapted" else []
        train("hf_ptune.train", f"{task}_p_tuning_v2.yaml", *same, *further, f"--output_dir={out}")
        keep(f"{kind}/{task}/{seed}", told(out / "adapter") | {"minutes": round((time.perf_counter() - begin) / 60, 1)})


def report() -> None:
    """Write the table: test F1, mean ± deviation over seeds."""
    lines = [
        __doc__.split("\n\n")[2].strip(),
        "",
        "Test F1, mean ± deviation over seeds (their number in brackets).",
        "",
    ]
    lines += [f"| | {' | '.join(TASKS)} |", f"| --- |{' --- |' * len(TASKS)}"]
    for kind in _EPOCHS:
        cells = []
        for task in TASKS:
            found = [r["test_f1"] for key, r in records().items() if re.fullmatch(rf"{kind}/{task}/\d+", key)]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.fmean(found):.3f}{spread} ({len(found)})".replace("0.", ".") if found else "")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    (HERE / "results.md").write_text("\n".join(["# One prompt for several corpora", "", *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default=",".join(_EPOCHS))
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "ptune_several"), help="of the runs")
    given = parser.parse_args()
    for seed in map(int, given.seeds.split(",")):
        for kind in given.runs.split(","):
            run(kind, seed, Path(given.folder))
            report()


if __name__ == "__main__":
    main()
