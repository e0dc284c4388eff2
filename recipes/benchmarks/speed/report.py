"""Records to a table and a plot."""

from pathlib import Path
from typing import Any

MIB = 2**20
_HEAD = 4  # lines of a table before its first row


def write(records: dict[str, Any], folder: Path) -> None:
    """Write results.md and results.png."""
    lines = ["# Time and memory beside PEFT", ""]
    for where in sorted({r["where"] for r in records.values()}, key=lambda name: "CPU" not in name):
        mine = [r for r in records.values() if r["where"] == where]
        lines += [f"## On {where}", "", *_training(mine), *_memory(mine), *_generation(mine), *_rest(mine)]
    (folder / "results.md").write_text("\n".join(lines).rstrip() + "\n")
    _plot(records, folder / "results.png")


def _of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == kind]


def _training(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "### Training step",
        "",
        "Seconds are medians; ratios are medians over rounds in which each runs once. PEFT / ours above 1: ours is "
        "faster. Floor: forward and backward of the frozen base without a prompt. Token bound: tokens that PEFT runs, "
        "over those that have to run.",
        "",
        "| what | ours, s | PEFT, s | floor, s | PEFT / ours | token bound | ours / floor | PEFT / floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in _of(records, "train"):
        r = record["result"]
        if "error" in r:
            lines.append(f"| {record['title']} | {r['error']} | | | | | | |")
            continue
        bound = r.get("tokens, peft / hf_ptune")
        lines.append(
            f"| {record['title']} | {r['hf_ptune']:.3f} | {r['peft']:.3f} | {r['base']:.3f} | "
            f"{r['peft / hf_ptune']:.2f} | {'' if bound is None else f'{bound:.2f}'} | {r['hf_ptune / base']:.2f} | "
            f"{r['peft / base']:.2f} |"
        )
    return [*lines, ""] if _of(records, "train") else []


def _memory(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "### Peak memory of a training step",
        "",
        "Tensors held at the highest point beyond weights and gradients, MiB, each in a fresh process.",
        "",
        "| what | ours | PEFT | floor | PEFT / ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    found: dict[str, dict[str, Any]] = {}
    for record in _of(records, "memory"):
        found.setdefault(record["title"], {})[record["library"]] = record["result"]
    for title, by in found.items():
        cells = [
            by[name].get("error") or f"{by[name]['bytes'] / MIB:.0f}" if name in by else ""
            for name in ("hf_ptune", "peft", "base")
        ]
        both = "bytes" in by.get("peft", {}) and "bytes" in by.get("hf_ptune", {})
        ratio = f"{by['peft']['bytes'] / by['hf_ptune']['bytes']:.2f}" if both else ""
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio} |")
    return [*lines, ""] if found else []


def _generation(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "### generate",
        "",
        "| what | prefill, PEFT / ours | whole call of 32 tokens, PEFT / ours | ours / base without a prompt |",
        "| --- | --- | --- | --- |",
    ]
    for record in _of(records, "generate"):
        r = record["result"]
        if "error" in r:
            lines.append(f"| {record['title']} | {r['error']} | | |")
            continue
        first, whole = r["prefill"], r["whole call"]
        lines.append(
            f"| {record['title']} | {first['peft / hf_ptune']:.2f} | {whole['peft / hf_ptune']:.2f} | "
            f"{whole['hf_ptune / base']:.2f} |"
        )
    return [*lines, ""] if _of(records, "generate") else []


def _rest(records: list[dict[str, Any]]) -> list[str]:
    lines = ["### Long prefixes, loading, import", "", "| what | ours | PEFT or base |", "| --- | --- | --- |"]
    pairs: dict[str, dict[str, Any]] = {}
    for kind in ("long_prefix", "whole_load"):
        for record in _of(records, kind):
            pairs.setdefault(f"{kind}: {record['title']}", {})[record["library"]] = record["result"]
    for key, by in pairs.items():
        kind, title = key.split(": ", 1)
        if kind == "long_prefix":
            for what in ("keys and values", "peak"):
                cells = [f"{by[n][what] / MIB:.0f} MiB" if what in by.get(n, {}) else "" for n in ("hf_ptune", "peft")]
                lines.append(f"| {title}: {what} | {' | '.join(cells)} |")
        else:
            cells = [_resident(by.get(n, {})) for n in ("hf_ptune", "base")]
            lines.append(
                f"| peak resident memory of loading adapter and base; base alone; {title} | {' | '.join(cells)} |"
            )
    for kind, title in (("load", "adapter on a base in memory"), ("imports", "import, beside transformers")):
        for record in _of(records, kind):
            r = record["result"]
            if "error" not in r:
                what = f"{title}, {record['title']}" if kind == "load" else f"{title} ({r['transformers']:.2f} s)"
                lines.append(f"| {what} | {1000 * r['hf_ptune']:.0f} ms | {1000 * r['peft']:.0f} ms |")
    return [*lines, ""] if len(lines) > _HEAD else []


def _resident(result: dict[str, Any]) -> str:
    return f"{result['resident'] / MIB:.0f} MiB" if "resident" in result else str(result.get("error", ""))


def _plot(records: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in records.values() if r["kind"] == "train" and "error" not in r["result"]]
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.42 * len(rows)))
    places = range(len(rows))
    axes.barh(list(places), [r["result"]["peft / hf_ptune"] for r in rows], color="#3b6ea5", label="PEFT / ours")
    for place, row in zip(places, rows, strict=True):
        bound = row["result"].get("tokens, peft / hf_ptune")
        if bound is not None:
            axes.plot([bound, bound], [place - 0.4, place + 0.4], color="#c1432e", linewidth=2)
    axes.plot([], [], color="#c1432e", linewidth=2, label="token bound")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(places), [f"{r['title']} ({r['where'].split()[0]})" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step, PEFT / ours")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
