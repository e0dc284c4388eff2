"""Time and memory, ours beside PEFT's and beside a base without a prompt.

python recipes/benchmarks/speed/run.py [train memory generate long_prefix load whole_load imports] [--missing]

Writes results.json, results.md and results.png beside this file; what is not measured again is kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
RESULTS = HERE / "results.json"
Case = tuple[str, str, dict[str, Any]]  # kind, title, arguments


def cases(gpu: bool) -> list[Case]:
    """Every measurement, in the order of the table."""
    found: list[Case] = []
    name = "llama-1b" if gpu else "smollm2"
    for rows, length, virtual in (
        (16, 32, 100),
        (16, 32, 200),
        (16, 128, 100),
        (4, 32, 100),
        (4, 32, 200),
        (4, 128, 100),
        (4, 128, 20),
    ):
        shape = {"rows": rows, "length": length, "virtual": virtual}
        found.append(
            (
                "train",
                f"Prompt Tuning, {name}, B {rows} S {length} P {virtual}",
                {"name": name, "method": "prompt_tuning"} | shape,
            )
        )
    for method, title in (("p_tuning_v2", "P-Tuning v2"), ("prefix_tuning", "Prefix Tuning")):
        for rows, virtual in ((4, 20), (4, 128), (16, 20)):
            shape = {"rows": rows, "length": 128, "virtual": virtual}
            found.append(
                ("train", f"{title}, {name}, B {rows} S 128 P {virtual}", {"name": name, "method": method} | shape)
            )
    few = {"name": name, "method": "prompt_tuning", "rows": 16, "length": 128, "virtual": 20, "labelled": 8}
    found.append(("train", f"Prompt Tuning, {name}, B 16 S 128 P 20, 8 labels a row", few))
    others = ("llama", "bloom", "minilm") if not gpu else ("llama-8b",)
    for other in others:
        shape = {"rows": 8, "length": 128, "virtual": 20}
        found.append(
            ("train", f"P-Tuning v2, {other}, B 8 S 128 P 20", {"name": other, "method": "p_tuning_v2"} | shape)
        )
        if other != "minilm":
            found.append(
                (
                    "train",
                    f"Prompt Tuning, {other}, B 8 S 64 P 100",
                    {"name": other, "method": "prompt_tuning", "rows": 8, "length": 64, "virtual": 100},
                )
            )
    if gpu:  # enough work to keep it busy
        full = {"name": "llama-8b", "rows": 16, "length": 128}
        found += [
            ("train", "Prompt Tuning, llama-8b, B 16 S 128 P 100", full | {"method": "prompt_tuning", "virtual": 100}),
            ("train", "P-Tuning v2, llama-8b, B 16 S 128 P 20", full | {"method": "p_tuning_v2", "virtual": 20}),
        ]
    for method, title, rows, length, virtual, checkpointing in (
        ("prompt_tuning", "Prompt Tuning", 16, 64, 100, False),
        ("p_tuning_v2", "P-Tuning v2", 4, 128, 20, False),
        ("p_tuning_v2", "P-Tuning v2", 4, 128, 128, False),
        ("prefix_tuning", "Prefix Tuning", 4, 128, 128, False),
        ("prefix_tuning", "Prefix Tuning", 16, 128, 20, False),
        ("p_tuning_v2", "P-Tuning v2", 4, 512, 20, False),
        ("p_tuning_v2", "P-Tuning v2", 4, 512, 20, True),
    ):
        for library in ("hf_ptune", "peft", "base"):
            shape = {"rows": rows, "length": length, "virtual": virtual, "checkpointing": checkpointing}
            title_ = f"{title}, {name}, B {rows} S {length} P {virtual}" + (", checkpointing" if checkpointing else "")
            found.append(("memory", title_, {"name": name, "method": method, "library": library} | shape))
    for virtual in (100, 200):
        shape = {"rows": 8, "length": 32, "virtual": virtual}
        found.append(
            (
                "generate",
                f"Prompt Tuning, {name}, B 8 S 32 P {virtual}",
                {"name": name, "method": "prompt_tuning"} | shape,
            )
        )
    for library in ("hf_ptune", "peft"):
        found.append(
            (
                "long_prefix",
                f"{name}, B 16, prefix of 2048",
                {"name": name, "rows": 16, "virtual": 2048, "library": library},
            )
        )
    found.append(("load", f"{name}, P 20", {"name": name, "virtual": 20}))
    for library in ("base", "hf_ptune"):
        found.append(("whole_load", f"{name}, P 20", {"virtual": 20, "library": library}))
    found.append(("imports", "beside transformers", {}))
    return found


def measure(kind: str, arguments: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run one case in a fresh process."""
    program = (
        f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parents[2])]!r}\n"
        "import json, logging, warnings; warnings.simplefilter('ignore')\n"
        f"import torch, transformers; torch.set_num_threads({threads})\n"
        "transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()\n"
        f"from cases import CASES\nprint('RESULT ' + json.dumps(CASES[{kind!r}](**{arguments!r})))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def save_base(name: str, folder: Path) -> None:
    """Write a base and an adapter on it, for the memory of loading."""
    from bases import base, forget_quantisation, prompted

    model = base(name)
    forget_quantisation(model)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    prompted("hf_ptune", model, "p_tuning_v2", 20).save_pretrained(folder / "adapter", flatten=True)
    os.environ["PTUNE_BENCHMARK_BASE"] = str(folder / "base")
    os.environ["PTUNE_BENCHMARK_ADAPTER"] = str(folder / "adapter")


def main() -> None:
    from report import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a title")
    parser.add_argument("--missing", action="store_true", help="measure only what has no record")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    records: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    where = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {options.threads} threads"
    with tempfile.TemporaryDirectory() as folder:
        for kind, title, arguments in cases(gpu):
            if (options.kinds and kind not in options.kinds) or options.only not in title:
                continue
            library = arguments.get("library")
            key = f"{kind}: {title}" + (f": {library}" if library else "")
            if options.missing and "error" not in records.get(key, {}).get("result", {"error": 0}):
                continue
            if kind == "whole_load" and "PTUNE_BENCHMARK_BASE" not in os.environ:
                save_base("smollm2", Path(folder))
            result = measure(kind, arguments, options.threads)
            records[key] = {"kind": kind, "title": title, "library": library, "where": where, "result": result}
            print(key, json.dumps(result), flush=True)
            RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    write(records, HERE)


if __name__ == "__main__":
    main()
