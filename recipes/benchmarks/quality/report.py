"""Records to tables and a plot."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from columns import COLUMNS, untouched
from tasks import TASKS

Record = dict[str, Any]
# ours, and what of PEFT it stands against
RIVALS = {
    "prompt_tuning": "peft_prompt_tuning",
    "p_tuning": "peft_p_tuning",
    "prefix_tuning": "peft_prefix",
    "p_tuning_v2": "peft_prefix",
}
_WHAT = """Test figure of the setting that each column chose on validation, mean ± deviation over seeds (their number in
brackets where it is not three). A dot: not run. Accuracy for classes, entity F1 for tags (btc, wikigold, srl), word F1
for spans (qasrl, squad), loss of the answer's tokens for language models (alpaca_zh), with BLEU (e2e). Rows and epochs
of each task stand in tasks.py; they are the same for every column.
"""
_INTRODUCTION = {
    "short": f"# Quality beside PEFT, heads alone and full fine-tuning\n\n{_WHAT}",
    "fresh": f"# The same, tested on rows of the training files that nothing was trained on\n\n{_WHAT}",
    "long": f"# The same with nearly all rows and more epochs\n\n{_WHAT}",
    "decoder": f"# Heads over a decoder, SmolLM2-135M\n\n{_WHAT}",
}


def write(records: dict[str, Record], folder: Path) -> None:
    """Write results.md, defaults.md and results.png, and the same of the other budgets."""
    for budget, suffix in (("short", ""), ("fresh", "_fresh"), ("long", "_long"), ("decoder", "_decoder")):
        of_budget = {key: r for key, r in records.items() if TASKS[r["task"]].budget == budget}
        if of_budget:
            _write(of_budget, folder, budget, suffix)


def _write(records: dict[str, Record], folder: Path, budget: str, suffix: str) -> None:
    chosen = choose(records)
    tasks = [t for t in TASKS if any(task == t for task, _ in chosen)]
    columns = [c for c in COLUMNS if any(column == c for _, column in chosen)]
    lines = [
        _INTRODUCTION[budget],
        *_figures(chosen, tasks, columns),
        *_against(chosen, tasks),
        *_halves(records, chosen, tasks),
        *_defaults(records, chosen, tasks),
        *_costs(chosen, tasks, columns),
    ]
    failed = [r for r in records.values() if "error" in r]
    if failed:
        lines += ["## Failures", "", "| task | column | setting | error |", "| --- | --- | --- | --- |"]
        lines += [f"| {r['task']} | {r['column']} | {_plain(r['setting'])} | {r['error']} |" for r in failed]
    (folder / f"results{suffix}.md").write_text("\n".join(lines).rstrip() + "\n")
    (folder / f"defaults{suffix}.md").write_text("\n".join(_settings(records)).rstrip() + "\n")
    if tasks:
        _plot(chosen, tasks, folder / f"results{suffix}.png")


def choose(records: dict[str, Record]) -> dict[tuple[str, str], list[Record]]:
    """Runs with test figures of the setting that is best on validation, by task and column."""
    grouped: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        if record.get("validation") and "test" in record and "part" not in record["setting"]:
            grouped[record["task"], record["column"]][json.dumps(record["setting"], sort_keys=True)].append(record)
    return {
        where: max(by.values(), key=lambda runs: (_mean(final(r) for r in runs if r["seed"] == 0), len(runs)))
        for where, by in grouped.items()
    }


def final(record: Record) -> float:
    """The validation figure after the last epoch."""
    figure: float = record["validation"][-1]
    return figure


def _mean(values: Any) -> float:
    found = list(values)
    return statistics.fmean(found) if found else float("-inf")


def _plain(setting: dict[str, Any]) -> str:
    names = {"lr": "lr", "length": "P"}
    return ", ".join(f"{names.get(k, k)} {v:g}" if type(v) in (int, float) else f"{k} {v}" for k, v in setting.items())


def _figure(runs: Sequence[Record]) -> str:
    tests = [r["test"] for r in runs]
    if isinstance(tests[0], list):
        return " / ".join(_spread([t[i] * sign for t in tests], 2) for i, sign in ((0, -1), (1, 1)))
    if tests[0] < 0:
        return _spread([-t for t in tests], 3)
    return _spread(tests, 3)


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    text += "" if len(values) == 3 else f" ({len(values)})"
    return text.replace("0.", ".") if digits == 3 else text


def _figures(chosen: dict[Any, list[Record]], tasks: Sequence[str], columns: Sequence[str]) -> list[str]:
    lines = [
        f"| column | {' | '.join(tasks)} |",
        f"| --- |{' --- |' * len(tasks)}",
    ]
    for column in columns:
        cells = [_figure(chosen[t, column]) if (t, column) in chosen else "." for t in tasks]
        lines.append(f"| {COLUMNS[column].title} | {' | '.join(cells)} |")
    return [*lines, ""]


def reached(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """Part of the steps after which ours has the validation figure that PEFT ends with, by epochs."""
    goal = _mean(final(r) for r in theirs)
    curve = [statistics.fmean(point) for point in zip(*(r["validation"] for r in ours), strict=True)]
    epoch = next((n for n, figure in enumerate(curve, 1) if figure >= goal), None)
    return "not reached" if epoch is None else f"{epoch} of {len(curve)}"


def _against(chosen: dict[Any, list[Record]], tasks: Sequence[str]) -> list[str]:
    lines = [
        "## Against PEFT at equal steps, and against full fine-tuning",
        "",
        "Differences of test figures in points; epochs until ours has the validation figure that PEFT ends with.",
        "",
        "| task | ours | ours - PEFT | epochs to PEFT's last figure | ours - full | ours - head on mean |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        for column, rival in RIVALS.items():
            ours = chosen.get((task, column))
            if ours is None:
                continue
            cells = [_difference(ours, chosen.get((task, c))) for c in (rival, "full", "head_mean")]
            theirs = chosen.get((task, rival))
            cells.insert(1, reached(ours, theirs) if theirs else ".")
            lines.append(f"| {task} | {COLUMNS[column].title} | {' | '.join(cells)} |")
    return [*lines, ""]


def _halves(records: dict[str, Record], chosen: dict[Any, list[Record]], tasks: Sequence[str]) -> list[str]:
    """What runs of half the steps at the defaults came to beside whole ones of PEFT."""
    lines = [
        "## Half of PEFT's steps",
        "",
        "Untouched defaults trained for half of the steps, over which the rate falls to zero, and PEFT's chosen "
        "setting trained for all of them: validation and test, means over the same seeds.",
        "",
        "| task | ours | steps | validation | PEFT's | test | PEFT's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    head = len(lines)
    for task, column, runs in _at_defaults(records, tasks, part=0.5):
        seeds = [r["seed"] for r in runs]
        theirs = [r for r in chosen.get((task, RIVALS[column]), []) if r["seed"] in seeds]
        if len(theirs) == len(runs):
            figures = [f"{_mean(final(r) for r in x):.3f}" for x in (runs, theirs)]
            figures += [_figure(x) for x in (runs, theirs)]
            steps = f"{runs[0]['steps']} of {theirs[0]['steps']}"
            lines.append(f"| {task} | {COLUMNS[column].title} | {steps} | {' | '.join(figures)} |")
    return [*lines, ""] if len(lines) > head else []


def _at_defaults(
    records: dict[str, Record], tasks: Sequence[str], **changes: Any
) -> Iterator[tuple[str, str, list[Record]]]:
    """Task, column of ours, and its runs with test figures at the defaults of recipes but for some changes."""
    for task in tasks:
        for column in RIVALS:
            wanted = (task, column, untouched(COLUMNS[column], TASKS[task]) | changes)
            here = [r for r in records.values() if (r["task"], r["column"], r["setting"]) == wanted]
            if runs := [r for r in here if "test" in r]:
                yield task, column, runs


def _defaults(records: dict[str, Record], chosen: dict[Any, list[Record]], tasks: Sequence[str]) -> list[str]:
    """What runs at the defaults came to, whatever validation says of them."""
    lines = [
        "## Defaults, untouched",
        "",
        "Test figures of the settings that recipes have where nobody names any, and differences as above.",
        "",
        "| task | ours | setting | test | ours - PEFT | ours - full | ours - head on mean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    head = len(lines)
    for task, column, runs in _at_defaults(records, tasks):
        cells = [_difference(runs, chosen.get((task, c))) for c in (RIVALS[column], "full", "head_mean")]
        cells = [COLUMNS[column].title, _plain(runs[0]["setting"]), _figure(runs), *cells]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > head else []


def _difference(ours: Sequence[Record], theirs: Sequence[Record] | None) -> str:
    if theirs is None:
        return "."
    means = [
        statistics.fmean(t[0] if isinstance(t, list) else t for t in (r["test"] for r in x)) for x in (ours, theirs)
    ]
    return f"{100 * (means[0] - means[1]):+.1f}"


def _costs(chosen: dict[Any, list[Record]], tasks: Sequence[str], columns: Sequence[str]) -> list[str]:
    lines = [
        "## Chosen settings and what they cost",
        "",
        "Medians over seeds. CPU seconds of all threads include a pass over validation after every epoch, and for "
        "heads the features only where they were not cached; peak resident memory is of the whole process, base "
        "included. Runs on a GPU shared it with up to twenty others, so that their seconds say little.",
        "",
        "| task | column | setting | validation | trained | steps | CPU s | peak RSS, MiB | device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        for column in columns:
            runs = chosen.get((task, column))
            if runs is None:
                continue
            middle = [statistics.median(r[name] for r in runs) for name in ("cpu_seconds", "peak_rss_mib")]
            lines.append(
                f"| {task} | {COLUMNS[column].title} | {_plain(runs[0]['setting'])} | "
                f"{_mean(final(r) for r in runs):.3f} | {runs[0]['parameters']:,} | {runs[0]['steps']} | "
                f"{middle[0]:.0f} | {middle[1]:.0f} | {runs[0].get('device', 'CPU')} |"
            )
    return [*lines, ""]


def _settings(records: dict[str, Record]) -> list[str]:
    """Validation figures of every setting by task, and how far each is from its task's best on the mean."""
    lines = [
        "# Settings tried",
        "",
        "Validation figure after the last epoch with seed 0, by which settings are chosen; in brackets the mean over "
        "three seeds where they ran. Gap: how far a setting is below the best of its column on a task with seed 0, in "
        "points, mean and largest over the tasks where it ran. Settings not named are those of a fresh `PTuneConfig`, "
        "a warm-up of 6 %, linear decay, and one rate for prompt and head.",
        "",
    ]
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in sorted(records.values(), key=lambda r: int(r["seed"])):
        if "part" in record["setting"]:
            continue
        setting = _plain(dict(sorted(record["setting"].items())))
        of_task = found[record["column"]][setting][record["task"]]
        if record.get("validation") and (of_task or record["seed"] == 0):
            of_task.append(final(record))
    tables: list[str] = []
    summary = ["| column | best by task | pooled: ran on most tasks, smallest mean gap |", "| --- | --- | --- |"]
    for column in (c for c in COLUMNS if c in found):
        settings = {s: {t: v for t, v in by.items() if v} for s, by in found[column].items()}
        settings = {s: by for s, by in settings.items() if by}
        tasks = [t for t in TASKS if any(t in by for by in settings.values())]
        best = {t: max(by[t][0] for by in settings.values() if t in by) for t in tasks}
        gaps = {s: [100 * (best[t] - by[t][0]) for t in tasks if t in by] for s, by in settings.items()}
        winners = [f"{t}: {next(s for s, by in settings.items() if t in by and by[t][0] == best[t])}" for t in tasks]
        pooled = min(settings, key=lambda s: (-len(gaps[s]), statistics.fmean(gaps[s])))
        summary.append(
            f"| {COLUMNS[column].title} | {'; '.join(winners)} | {pooled} ({len(gaps[pooled])} tasks, mean gap "
            f"{statistics.fmean(gaps[pooled]):.1f}) |"
        )
        tables += [
            f"## {COLUMNS[column].title}",
            "",
            f"| setting | {' | '.join(tasks)} | mean gap | largest gap |",
            f"| --- |{' --- |' * (len(tasks) + 2)}",
        ]
        for setting, by in sorted(settings.items()):
            cells = [_cell(by.get(t, []), best[t]) for t in tasks]
            mean = f"{statistics.fmean(gaps[setting]):.1f} (of {len(gaps[setting])})"
            tables.append(f"| {setting} | {' | '.join(cells)} | {mean} | {max(gaps[setting]):.1f} |")
        tables.append("")
    return [*lines, *summary, "", *tables]


def _cell(values: Sequence[float], best: float) -> str:
    if not values:
        return "."
    text = f"{values[0]:.3f}" + (f" ({_mean(values):.3f})" if len(values) > 1 else "")
    return f"**{text}**" if values[0] == best else text


def _plot(chosen: dict[Any, list[Record]], tasks: Sequence[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(3, len(tasks))
    tall = -(-len(tasks) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(4.2 * wide, 3.2 * tall), squeeze=False)
    shown = [c for c in COLUMNS if any((t, c) in chosen for t in tasks)]
    for place, task in zip(axes.flat, tasks, strict=False):
        for column in shown:
            if (task, column) in chosen:
                curves = [r["validation"] for r in chosen[task, column]]
                curve = [statistics.fmean(point) for point in zip(*curves, strict=True)]
                style = {"peft": "--", "head": ":"}.get(COLUMNS[column].library, "-")
                place.plot(range(1, len(curve) + 1), curve, style, color=f"C{shown.index(column)}", label=column)
        place.set_title(task, fontsize=9)
        place.set_xlabel("epoch", fontsize=8)
        place.set_ylabel(f"validation {TASKS[task].metric}", fontsize=8)
        place.tick_params(labelsize=7)
    for place in list(axes.flat)[len(tasks) :]:
        place.axis("off")
    handles: dict[str, Any] = {}
    for place in axes.flat:
        handles |= {label: handle for handle, label in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=7)
    figure.tight_layout(rect=(0, 0.04 + 0.2 / tall, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
