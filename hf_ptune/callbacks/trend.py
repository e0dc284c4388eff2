"""Whether losses rise or fall, beyond their noise: of one task by itself, or of several, each beside itself."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_LEAST_POINTS = 4
# logarithms of ratios: so little above chance, or below it, losses have come down to what knows nothing
_AT_CHANCE, _LITTLE = 0.05, 0.01


@dataclass(frozen=True)
class Trend:
    """Hold how the latest losses lie beside the early ones, as logarithms of their ratios, each with its error.

    Args:
        first: the latest beside the first loss, and the standard error of that.
        beyond: beside the first or chance, whichever is more.
        start: beside the first and those of the next log.
        falls: beside the first, and beside the first quarter without it; where the latest are at chance, beside that
            if it is less.
    """

    first: tuple[float, float]
    beyond: float
    start: tuple[float, float]
    falls: tuple[tuple[float, float], tuple[float, float]]


@dataclass
class Losses:
    """Hold the logged losses of one task: the first of them of one step, the others means over some.

    A loss of 0 comes from a batch without labels, and does not count. Compared are logarithms: a low loss among noisy
    ones would else pass for a low start, and noise grows with the loss.

    Args:
        chance: the loss of whoever knows nothing of the rows, where that is known.
        values: as logged.
        steps: at which.
    """

    chance: float = math.inf
    values: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add(self, value: float, step: int) -> None:
        """Keep what was logged at a step."""
        if value != 0 and math.isfinite(value):
            self.values.append(value)
            self.steps.append(step)

    @property
    def comparable(self) -> bool:
        """Whether there are enough to compare, and none below zero, beside which nothing has a ratio."""
        return len(self.values) >= _LEAST_POINTS and min(self.values) > 0

    @property
    def latest(self) -> float:
        """Mean of the latest quarter."""
        return statistics.fmean(self.values[-self._quarter() :])

    def trend(self) -> Trend:
        """Compare the latest quarter with what was before it."""
        # of neighbours: a trend hardly counts in them
        differences = [math.log(b) - math.log(a) for a, b in itertools.pairwise(self.values[1:])]
        noise = math.sqrt(statistics.fmean(d * d for d in differences) / 2)  # of one log
        span = (self.steps[-1] - self.steps[0]) / len(differences)  # steps of a log
        quarter, (one, two) = self._quarter(), self.values[:2]
        first_steps = self.steps[1] - self.steps[0] + 1
        start = (one + two * (first_steps - 1)) / first_steps

        def beside(other: float, logs: float) -> tuple[float, float]:
            return math.log(self.latest) - math.log(other), noise * math.sqrt(1 / logs + 1 / quarter)

        def below(other: float, logs: float) -> tuple[float, float]:
            return beside(self.chance, math.inf) if at_chance and self.chance < other else beside(other, logs)

        # for two quarters, and no longer on the way down
        ends = [statistics.fmean(self.values[-2 * quarter : -quarter]), self.latest]
        above = [math.log(end / self.chance) for end in ends] if self.chance < math.inf else [math.inf]
        at_chance = min(above) > -_LITTLE and max(above) < _AT_CHANCE and above[0] - above[-1] < _LITTLE
        early = statistics.fmean(self.values[1 : 1 + quarter])
        falls = below(one, 1 / span), below(early, quarter)
        beyond = math.log(self.latest / (max(one, self.chance) if self.chance < math.inf else one))
        return Trend(beside(one, 1 / span), beyond, beside(start, first_steps / span), falls)

    def _quarter(self) -> int:
        return max(2, len(self.values) // 4)


def common_trend(trends: Sequence[Trend]) -> Trend:
    """The mean of the trends of several tasks, with the errors of that.

    Args:
        trends: one of each; at least one.
    """

    def mean(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        return statistics.fmean(p[0] for p in pairs), math.hypot(*(p[1] for p in pairs)) / len(pairs)

    first, early = ([t.falls[k] for t in trends] for k in (0, 1))
    beyond = statistics.fmean(t.beyond for t in trends)
    return Trend(mean([t.first for t in trends]), beyond, mean([t.start for t in trends]), (mean(first), mean(early)))
