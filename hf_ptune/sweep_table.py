"""What a sweep gave: its runs, their table and their plot."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from hf_ptune.adapter_file import staged
from hf_ptune.errors import naming

RESULTS_NAME, TABLE_NAME, PLOT_NAME = "results.json", "results.md", "sweep.png"


@dataclass(frozen=True)
class Trial:
    """Hold one run of the grid.

    Args:
        learning_rate: peak learning rate.
        num_virtual_tokens: P; `None` for a method without a prompt.
        seed: of prompt, head and training.
        metrics: of the validation rows; empty where it failed.
        seconds: training and evaluation.
        learning: what `LearningCallback` found.
        error: why it failed.
    """

    learning_rate: float
    num_virtual_tokens: int | None
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    learning: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def place(self) -> tuple[float, int | None, int]:
        """Where in the grid."""
        return self.learning_rate, self.num_virtual_tokens, self.seed


@dataclass(frozen=True)
class Sweep:
    """Hold what a grid gave.

    Args:
        trials: all runs, failed ones too, in order of the grid.
        metric: the metric that chooses; greater is better.
        command: the command line of the recipe without the chosen values.
        beside: metrics that stand beside that in the table; of several tasks each one's own.
    """

    trials: list[Trial]
    metric: str
    command: str
    beside: Sequence[str] = ()

    @property
    def title(self) -> str:
        """What a cell of the table holds."""
        return f"{self.metric} ({', '.join(self.beside)})" if self.beside else self.metric

    def mean(self, rate: float, length: int | None, metric: str | None = None) -> tuple[float, float | None]:
        """Mean and sample deviation over seeds; NaN where one of them failed, no deviation of one seed."""
        cell = [t for t in self.trials if t.place[:2] == (rate, length)]
        values = [t.metrics[metric or self.metric] for t in cell if t.error is None]
        if not cell or len(values) < len(cell):
            return math.nan, None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def rates(self) -> list[float]:
        return sorted({t.learning_rate for t in self.trials})

    @property
    def lengths(self) -> list[int | None]:
        return sorted({t.num_virtual_tokens for t in self.trials}, key=lambda n: n or 0)

    def best(self) -> tuple[float, int | None] | None:
        """Learning rate and length of the greatest mean; the shorter prompt, then the lower rate, of equals."""
        cells = [(self.mean(r, n)[0], n, r) for n, r in product(self.lengths, self.rates)]
        whole = [c for c in cells if math.isfinite(c[0])]
        if not whole:
            return None
        _, length, rate = max(whole, key=lambda c: (c[0], -(c[1] or 0), -c[2]))
        return rate, length

    def best_command(self) -> str:
        """The command line that trains with the best of the grid."""
        best = self.best()
        if best is None:
            return "no run of the grid succeeded"
        length = "" if best[1] is None else f" --options.num_virtual_tokens={best[1]}"
        return f"{self.command} --training.learning_rate={float(best[0])!r}{length}"

    def table(self, markdown: bool = False) -> str:
        """Lengths down, learning rates across; `*` marks the best, `!` what the watch on learning warned of."""
        head = ["tokens", *(f"{rate:g}" for rate in self.rates)]
        lines = [head] + [
            ["none" if n is None else str(n), *(self._cell(r, n) for r in self.rates)] for n in self.lengths
        ]
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        rows = [[cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
        if not markdown:
            return "\n".join("  ".join(row) for row in rows)
        rule = "| " + " | ".join("-" * (w - 1) + ":" for w in widths) + " |"
        text = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([text[0], rule, *text[1:]])

    def _cell(self, rate: float, length: int | None) -> str:
        mean, deviation = self.mean(rate, length)
        if math.isnan(mean):
            return "failed"
        spread = "" if deviation is None else f" ± {deviation:.3f}"
        warned = any(t.learning for t in self.trials if t.place[:2] == (rate, length))
        marks = ("!" if warned else "") + ("*" if (rate, length) == self.best() else "")
        beside = [f"{self.mean(rate, length, metric)[0]:.3f}" for metric in self.beside]
        return f"{mean:.3f}{spread}{marks}" + (f" ({', '.join(beside)})" if beside else "")

    def notes(self) -> list[str]:
        """Failures and warnings, one line each."""
        lines = []
        for trial in self.trials:
            where = f"learning rate {trial.learning_rate:g}, {trial.num_virtual_tokens} tokens, seed {trial.seed}"
            lines += [f"{where}: failed: {trial.error}"] if trial.error else []
            lines += [f"{where}: {message}" for message in trial.learning.values()]
        return lines


def write_table(found: Sweep, folder: Path, counts: Sequence[int]) -> None:
    """Write table and plot.

    Args:
        found: what they show.
        folder: takes them.
        counts: validation rows; of several tasks those of each.
    """
    with staged(folder) as aside:
        with naming(aside / PLOT_NAME):
            plot = draw(found, aside / PLOT_NAME)
        rows = " + ".join(map(str, counts))
        lines = [f"{found.title} of {rows} validation rows; learning rates across, virtual tokens down", ""]
        lines += [found.table(markdown=True), "", f"Best: `{found.best_command()}`"]
        lines += ["", *(f"- {note}" for note in found.notes())] if found.notes() else []
        lines += ["", f"![{found.metric} over learning rates]({PLOT_NAME})"] if plot else []
        with naming(aside / TABLE_NAME):
            (aside / TABLE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(found: Sweep, path: Path) -> bool:
    """Draw the metric over learning rates, a line for each length.

    Returns:
        Whether it could: matplotlib is installed, and some run succeeded.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if found.best() is None:
        return False
    figure = Figure(figsize=(5, 3.4))
    axes = figure.subplots()
    for length in found.lengths:
        cells = [(rate, *found.mean(rate, length)) for rate in found.rates]
        whole = [(rate, mean, deviation or 0.0) for rate, mean, deviation in cells if math.isfinite(mean)]
        if whole:
            label = "no virtual tokens" if length is None else f"{length} tokens"
            x, y, spread = zip(*whole, strict=True)
            axes.errorbar(x, y, yerr=spread if any(spread) else None, marker="o", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"validation {found.metric}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return True


def report(found: Sweep, folder: Path) -> str:
    """What to print when a sweep has ended."""
    lines = [f"validation {found.title}; learning rates across, virtual tokens down", found.table(), *found.notes()]
    where = f"written: {folder / RESULTS_NAME}, {folder / TABLE_NAME}"
    if (folder / PLOT_NAME).is_file():
        where += f", {folder / PLOT_NAME}"
    elif found.best() is not None:
        where += '; no plot: pip install "hf_ptune[plots]", and run the sweep again (nothing is trained anew)'
    return "\n".join([*lines, where, f"best: {found.best_command()}"])
