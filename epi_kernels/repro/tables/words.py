"""Sentences and cells from numbers. A sentence claims what an interval bears and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from epi_kernels.repro.methods.config import Method
from epi_kernels.repro.preset import Try
from epi_kernels.repro.statistics import FEWEST, Interval, Summary, summary
from epi_kernels.repro.writers.findings import failed, held

SAME, NOTHING = "no difference shown", "nothing claimed"
FEW = {1: "one seed", 2: "two seeds"}
INTERVALS = (
    "Intervals are 95 % Student t-intervals of the mean over seeds, of paired differences where two methods are"
    " compared; they are not corrected for how many comparisons are made. Of fewer than three seeds, and where all seeds"
    " are equal, nothing is claimed. All seeds of a model start from one base model:"
    " another one is not in the intervals."
)


def bracket(found: Interval, digits: int = 1) -> str:
    return f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def compared(
    subject: str,
    places: Mapping[str, Sequence[float]],
    better: str,
    worse: str,
    *,
    versus: str,
    everywhere: str = "",
    measure: str = "",
    digits: int = 1,
    claim: bool = True,
) -> str:
    """One sentence on the differences from `versus`, one value a seed at each place.

    "EPI keeps more than full SFT in both directions (dA@B: a → b +12.3 [+3.1, +21.5]; ...; 95 % intervals, n = 5)."
    Places whose intervals say different things are named apart. ``claim``: `better` is what a paper, or this package,
    would have; the sentence says then whether it held, which takes every place. Nothing is claimed of fewer than
    three seeds, nor of a difference that all seeds share to the last digit.
    """
    found = {place: summary(values) for place, values in places.items()}
    n = next(iter(found.values())).n
    groups: dict[str, list[str]] = {better: [], worse: [], SAME: [], NOTHING: []}
    for place, one in found.items():
        groups[_said(one, better, worse)].append(place)
    told = {said: where for said, where in groups.items() if where}
    lead = f"{measure}: " if measure else ""
    close = FEW.get(n, f"95 % intervals, n = {n}")

    def numbers(where: Sequence[str]) -> str:
        return "; ".join(f"{place} {_number(found[place], digits)}".strip() for place in where)

    if len(told) == 1:
        ((said, where),) = told.items()
        scope = f" {everywhere}" if everywhere and len(where) > 1 else ""
        head = f"{subject} and {versus}: {said}" if said in (SAME, NOTHING) else f"{subject} {said}{scope}"
        sentence = f"{head} ({lead}{numbers(where)}; {close})."
        if not claim or said == NOTHING:
            return sentence
        return held(sentence) if said == better else failed(sentence)
    parts = [f"{said} on {', '.join(where)} ({lead}{numbers(where)})" for said, where in told.items()]
    sentence = f"{subject} {'; '.join(parts)}; {close}."
    return failed(sentence) if claim else sentence


def _said(one: Summary, better: str, worse: str) -> str:
    if one.n < FEWEST or (one.all_equal and one.mean != 0):
        return NOTHING
    return (better if one.mean > 0 else worse) if one.excludes_zero else SAME


def _number(one: Summary, digits: int) -> str:
    mean = f"{one.mean:+.{digits}f}"
    if one.all_equal:
        return f"{mean} (all {one.n} seeds equal)"
    return f"{mean} {bracket(one.interval, digits)}" if one.interval and one.n >= FEWEST else mean


def everywhere(pairs: Sequence[tuple[str, str]]) -> str:
    """How to say "for every pair"."""
    if len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        return "in both directions"
    return f"on all {len(pairs)} pairs"


def setting(one: Try) -> str:
    """A try in a line: what of its method is no default, and its learning rate."""
    return ", ".join([method_setting(one.method), *([f"lr {one.lr:g}"] if one.lr is not None else [])])


def method_setting(method: Method) -> str:
    changed = method.model_dump(exclude_defaults=True)
    changed.pop("name", None)
    return ", ".join([method.name, *(f"{name} {value}" for name, value in changed.items())])
