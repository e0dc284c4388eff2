"""Every recipe's small variant with several seeds: the table of recipes/README.md, and the cards in model_cards/.

python recipes/benchmarks/recipes/run.py [--missing] [--recipes trec_p_tuning_v2,quickstart] [--seeds 0,1,2]
    [--base HuggingFaceTB/SmolLM2-135M=FOLDER]

Rows are read from recipes/data/<name>, as the variants say. Writes results.json beside this file after every run, then
metric (mean ± deviation over seeds), peak memory and minutes into the table, and a card of all seeds. A run that fails
stays in both, with what it said.
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
RESULTS, TABLE = HERE / "results.json", ROOT / "recipes" / "README.md"
_NUMBER = re.compile(r"(?:^|(?<= ))[\d.]+( ± [\d.]+)?( \(\d seeds\))?")  # and not that of F1
Record = dict[str, Any]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="", help="names, comma-separated; all when unset")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--base", action="append", default=[], help="ID=FOLDER: a base that is read from a folder")
    parser.add_argument("--missing", action="store_true", help="run only what has no record yet")
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "ptune_recipes"), help="of the runs")
    parser.add_argument("--report", action="store_true", help="write table and cards only")
    return parser.parse_args()


def records() -> dict[str, Record]:
    """All runs so far, by `recipe/seed`."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def measure(name: str, seed: int, folder: Path, bases: dict[str, str]) -> Record:
    """Train a recipe in a process of its own, and tell what it came to."""
    from hf_ptune.recipe import read_recipe

    path = ROOT / "recipes" / f"{name}.yaml"
    changes = ["--variant=small"] if re.search(r"^variants:", path.read_text(), re.MULTILINE) else []
    if (base := read_recipe(path, changes).base) in bases:
        changes += [f"--base={bases[base]}", f"--card.base={base}"]
    command = [sys.executable, "-m", "hf_ptune.train", str(path), *changes, f"--seed={seed}", f"--output_dir={folder}"]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    minutes = round((time.perf_counter() - begin) / 60, 1)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1], "minutes": minutes}
    return {"minutes": minutes, **told(name, folder)}


def told(name: str, folder: Path) -> Record:
    """The main metric of a run (of test rows where there are some), its peak memory, and the device."""
    from hf_ptune.cards import RunFacts
    from hf_ptune.recipe import read_recipe

    facts = RunFacts.load(folder / "adapter")
    metric, found = read_recipe(ROOT / "recipes" / f"{name}.yaml").build_task().metric, facts.metrics[-1]
    value = found.get(f"test_{metric}", found[metric])
    peak, device = round(facts.memory["rss_peak"]), facts.hardware
    return {"metric": metric, "value": round(value, 4), "peak_mib": peak, "device": device}


def shown(runs: list[Record]) -> tuple[str, str, str]:
    """The cells of metric, peak memory and minutes."""
    good = [r for r in runs if "value" in r]
    if not good:
        return f"failed: {runs[0]['error']}", "", f"{runs[0]['minutes']:.1f}"
    values = [r["value"] for r in good]
    text = figure(statistics.mean(values))
    if len(values) > 1:
        spread = statistics.stdev(values)
        text += f" ± {spread:.1f}" if values[0] >= 1 else f" ± {figure(spread)}"
        text += f" ({len(values)} seeds)" if len(values) != 3 else ""
    peak, minutes = max(r["peak_mib"] for r in good), statistics.median(r["minutes"] for r in good)
    return text, f"{peak:,} MiB", f"{minutes:.1f}"


def figure(value: float) -> str:
    """`.805`, or `46.1` where the scale goes to 100."""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.1f}"


def write_table(found: dict[str, Record]) -> None:
    """Put the last three cells of each recipe's line in order."""
    lines = TABLE.read_text().splitlines()
    for at, line in enumerate(lines):
        name = re.match(r"\| `(\w+)\.yaml` \|", line)
        runs = [r for k, r in found.items() if name and k.split("/")[0] == name[1]]
        if not runs:
            continue
        cells = line.split(" | ")
        text, peak, minutes = shown(runs)
        cells[-3] = _NUMBER.sub(text, cells[-3], count=1)
        cells[-2], cells[-1] = peak, _NUMBER.sub(minutes, cells[-1], count=1)
        lines[at] = " | ".join(cells)
    TABLE.write_text("\n".join(lines) + "\n")


def write_card(name: str, folders: list[Path]) -> None:
    """Make a recipe's card of its seeds' runs."""
    from hf_ptune.cards import RunFacts, merge_seeds
    from hf_ptune.publishing import remake_card

    card = ROOT / "model_cards" / name
    card.mkdir(exist_ok=True)
    merge_seeds([RunFacts.load(folder / "adapter") for folder in folders]).save(card)
    remake_card(card, [], f"user/{name}")


def main() -> None:
    options = parse()
    names = options.recipes.split(",") if options.recipes else sorted(p.stem for p in ROOT.glob("recipes/*.yaml"))
    bases = dict(one.split("=", 1) for one in options.base)
    for name in names:
        folders = []
        for seed in map(int, options.seeds.split(",")):
            key, folder = f"{name}/{seed}", Path(options.folder) / f"{name}-{seed}"
            if not options.report and not (options.missing and key in records()):
                record = measure(name, seed, folder, bases)
                RESULTS.write_text(json.dumps(records() | {key: record}, indent=1) + "\n")
                print(key, json.dumps(record), flush=True)
            if (folder / "adapter" / "run_facts.json").exists():
                folders.append(folder)
        if folders:
            write_card(name, folders)
    write_table(records())


if __name__ == "__main__":
    main()
