"""Pure arithmetic on scores: mean and spread, full fine-tuning's frontier, dA@B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

INSIDE, BELOW, ABOVE = "inside", "below", "above"


class Point(NamedTuple):
    """Scores after stage B, in percent."""

    b: float
    a: float


class Comparison(NamedTuple):
    """dA@B of one run: its score on A, less what full fine-tuning keeps of A at the same B."""

    gain: float
    full_a: float  # read off the frontier at the run's B
    where: str  # of the run's B against the frontier's runs: INSIDE, BELOW or ABOVE


class Spread(NamedTuple):
    mean: float
    sd: float  # of the sample, divisor n - 1; 0 for n = 1
    n: int


def spread(values: Sequence[float]) -> Spread:
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else 0.0
    return Spread(mean, math.sqrt(variance), n)


def frontier(runs: Sequence[Point]) -> list[Point]:
    """The runs worth choosing, by rising B: one that another equals or beats on both scores is left out."""
    kept: list[Point] = []
    for point in sorted(set(runs), reverse=True):  # falling B; at equal B the higher A first
        if not kept or point.a > kept[-1].a:
            kept.append(point)
    return kept[::-1]


def compare(run: Point, full: Sequence[Point], before: Point) -> Comparison:
    """dA@B against full fine-tuning's runs at several learning rates; `before` are the scores before stage B.

    Inside the runs' range of B the frontier is a straight line between neighbours. Above it, full fine-tuning is
    given the A of its run with the highest B: it would hardly keep more, so the gain is not overstated. Below it,
    the line goes on to `before`, where a learning rate of zero ends: an estimate, no run was made there.
    """
    points = frontier(full)
    low, high = points[0], points[-1]
    if run.b > high.b:
        full_a, where = high.a, ABOVE
    elif run.b < low.b:
        full_a, where = _line([before, low] if before.b < low.b else [low], run.b), BELOW
    else:
        full_a, where = _line(points, run.b), INSIDE
    return Comparison(run.a - full_a, full_a, where)


def _line(points: Sequence[Point], b: float) -> float:
    """A at `b`, linear between neighbours, flat beyond the ends."""
    if b <= points[0].b:
        return points[0].a
    for left, right in zip(points, points[1:]):
        if b <= right.b:
            return left.a + (right.a - left.a) * (b - left.b) / (right.b - left.b)
    return points[-1].a


def chance_jaccard(ratio: float, other: float | None = None) -> float:
    """Expected overlap of two independent random masks of these ratios, or both of the one; 1 for two empty ones."""
    if other is None:
        return ratio / (2 - ratio)
    union = ratio + other - ratio * other
    return ratio * other / union if union else 1.0
