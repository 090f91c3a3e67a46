"""What follows the drift of the masks: the next value from the present one and the overlap."""

from __future__ import annotations

import math

import pytest

from epi_kernels import AdaptiveInterval, AdaptiveRatio
from epi_kernels.policies.schedule import agreement


@pytest.mark.parametrize(
    ("now", "jaccard", "following"),
    [
        (10, 1.0, 15), (10, 0.8, 15), (10, 0.79, 10), (10, 0.4, 10), (10, 0.39, 6), (10, 0.0, 6),
        (19, 0.9, 20), (6, 0.1, 5), (5, 0.1, 5), (20, 1.0, 20), (7, 1.0, 11), (7, 0.0, 5),
    ],
)  # fmt: skip
def test_the_next_interval(now, jaccard, following):
    adaptive = AdaptiveInterval(10, minimum=5, maximum=20, low=0.4, high=0.8, factor=1.5)
    assert adaptive.following(now, jaccard) == following


@pytest.mark.parametrize(
    ("now", "jaccard", "following"),
    [
        (0.25, 1.0, 0.5),
        (0.25, 0.9, 0.5),
        (0.25, 0.7, 0.25),
        (0.25, 0.49, 0.125),
        (0.1, 0, 0.1),
        (0.4, 1, 0.5),
    ],
)
def test_the_next_ratio(now, jaccard, following):
    assert AdaptiveRatio(0.25, minimum=0.1, maximum=0.5).following(now, jaccard) == following


def test_agreement_of_masks_of_two_sizes():
    assert agreement(isolated=10, entered=2, released=2) == pytest.approx(8 / 12)  # the Jaccard overlap
    assert agreement(isolated=20, entered=10, released=0) == 1.0
    assert agreement(isolated=10, entered=0, released=10) == 1.0
    assert agreement(isolated=20, entered=20, released=10) == 0.0
    assert agreement(isolated=10, entered=10, released=0) is None
    assert agreement(isolated=0, entered=0, released=10) is None
    assert agreement(isolated=0, entered=0, released=0) is None


def test_bounds_left_out():
    assert (AdaptiveInterval().minimum, AdaptiveInterval().maximum) == (10, 1000)
    assert (AdaptiveInterval(4).minimum, AdaptiveInterval(4).maximum) == (1, 40)
    assert (AdaptiveRatio(0.2).minimum, AdaptiveRatio(0.2).maximum) == (0.02, 0.5)
    assert AdaptiveRatio(0.75).maximum == 0.75


@pytest.mark.parametrize(
    ("adaptive", "arguments", "said"),
    [
        (AdaptiveInterval, {"initial": 0}, "AdaptiveInterval.initial must be an int >= 1, got 0"),
        (AdaptiveInterval, {"initial": 2.5}, "initial must be an int"),
        (AdaptiveInterval, {"minimum": 0}, "minimum must be an int >= 1"),
        (AdaptiveInterval, {"minimum": 101}, r"initial must be within minimum and maximum \(101 to 1000\), got 100"),
        (AdaptiveInterval, {"minimum": 200, "maximum": 100}, "initial must be within"),
        (AdaptiveInterval, {"maximum": 99}, "initial must be within"),
        (AdaptiveInterval, {"low": 0.95}, r"low must be at most high \(0.9\), got 0.95"),
        (AdaptiveInterval, {"high": 1.5}, r"high must be a number in \[0, 1\], got 1.5"),
        (AdaptiveInterval, {"low": math.nan}, "low must be"),
        (AdaptiveInterval, {"factor": 1.0}, "factor must be a number above 1, got 1.0"),
        (AdaptiveInterval, {"factor": math.inf}, "factor must be"),
        (AdaptiveRatio, {"initial": 1.0}, r"AdaptiveRatio.initial must be a number in \[0, 1\), got 1.0"),
        (AdaptiveRatio, {"initial": 0}, r"initial must be a number in \(0, 1\), got 0"),
        (AdaptiveRatio, {"minimum": 0}, r"minimum must be a number in \(0, 1\), got 0"),
        (AdaptiveRatio, {"maximum": 1.0}, "maximum must be"),
        (AdaptiveRatio, {"maximum": 0.005}, "initial must be within"),
    ],
)  # fmt: skip
def test_what_an_adaptive_schedule_refuses(adaptive, arguments, said):
    with pytest.raises(ValueError, match=said):
        adaptive(**arguments)
