"""What the tables say of scores over seeds: means, intervals, paired differences, and dA@B against two frontiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from epi_kernels.scores import Comparison, Point, compare, spread

LEVEL = 0.95  # of every interval in the tables
FEWEST = (
    3  # seeds of which something is claimed: two may agree by chance, and their interval says nothing then
)
_ROUNDING = 1e-9  # of the mean: an sd below it is rounding


class Interval(NamedTuple):
    low: float
    high: float


class Summary(NamedTuple):
    """Of one value a seed. Not a number throughout when one of the values is not finite."""

    mean: float
    sd: float  # of the sample, divisor n - 1; 0 for n = 1
    n: int
    interval: Interval | None  # of the mean, Student's t; None for n = 1

    @property
    def all_equal(self) -> bool:
        """Whether all seeds gave the same: the interval has no width then, which is no certainty."""
        return self.n > 1 and self.sd <= _ROUNDING * abs(self.mean)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval claims a sign: of at least `FEWEST` seeds that are not all equal."""
        if self.interval is None or self.n < FEWEST or self.all_equal:
            return False
        return self.interval.low > 0 or self.interval.high < 0


def summary(values: Sequence[float], level: float = LEVEL) -> Summary:
    """Mean, sd and t-interval. Raises ValueError when there are no values."""
    if not values:
        raise ValueError("no values to summarise")
    if not all(map(math.isfinite, values)):
        nothing = Interval(math.nan, math.nan)
        return Summary(math.nan, math.nan, len(values), nothing if len(values) > 1 else None)
    mean, sd, n = spread(values)
    if n == 1:
        return Summary(mean, sd, n, None)
    half = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Summary(mean, sd, n, Interval(mean - half, mean + half))


def paired(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Summary:
    """Of the differences ours - theirs, seed by seed. Raises ValueError when the seeds do not match."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"{len(ours)} and {len(theirs)} values cannot be paired: one a seed, in the same order"
        )
    return summary([a - b for a, b in zip(ours, theirs)], level)


def t_quantile(probability: float, df: int) -> float:
    """Of Student's t with ``df`` degrees of freedom; 0 < probability < 1.

    The distribution function is a finite sum for whole ``df`` (Abramowitz and Stegun, 26.7.3 and 26.7.4), inverted by
    bisection in theta = atan(t / sqrt(df)). Raises ValueError.
    """
    if not 0 < probability < 1 or df < 1:
        raise ValueError(f"no quantile {probability} of a t distribution with {df} degrees of freedom")
    wanted = abs(2 * probability - 1)  # P(|T| < t)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _inside(middle, df) < wanted:
            low = middle
        else:
            high = middle
    return math.copysign(math.sqrt(df) * math.tan(low), probability - 0.5)


def _inside(theta: float, df: int) -> float:
    """P(|T| < sqrt(df) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = total = 0.0 if df == 1 else cosine if odd else 1.0
    for k in range(2 + odd, df - 1, 2):  # each term of the series from the one before it
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def normalised_average(scores: Mapping[str, float], full_marks: Mapping[str, float]) -> float:
    """CPI-FT's "Avg. Norm. Score" as its text defines it: each task's score on 0-10, then the mean over the tasks.

    ``full_marks``: 100 for a percentage, 10 for a judge's points, by the same names. Raises KeyError.
    """
    return math.fsum(10 * score / full_marks[task] for task, score in scores.items()) / len(scores)


@dataclass(frozen=True)
class Frontiers:
    """What full fine-tuning can trade of A for B on one seed, without any method: dA@B is measured against it.

    ``full``: its runs at several learning rates. ``interpolated``: WiSE-FT's models between `before` and every one of
    those runs. ``before``: the model before stage B, which is where an interpolation with alpha 0 ends.
    """

    full: tuple[Point, ...]
    interpolated: tuple[Point, ...]
    before: Point

    def over_full(self, run: Point) -> Comparison:
        return compare(run, self.full, self.before)

    def over_interpolated(self, run: Point) -> Comparison:
        """Against the better of WiSE-FT's models and full fine-tuning's own, alpha 0 and 1 included: all were made."""
        return compare(run, (self.before, *self.interpolated, *self.full), self.before)
