"""Findings, and notes, are sentences that say what kind they are by how they begin; these make and sort them."""

from __future__ import annotations

from collections.abc import Iterable

HELD, FAILED, SCALE, OTHER = "Held", "Did not hold", "Scale", "Also"
KINDS = (HELD, FAILED, SCALE, OTHER)  # the order they are told in
OURS = "Ours: "  # how a note begins that states a choice or a definition of this package


def held(sentence: str) -> str:
    return f"{HELD}: {sentence}"


def failed(sentence: str) -> str:
    return f"{FAILED}: {sentence}"


def scale(sentence: str) -> str:
    """Of what the findings are about: sizes, data, steps, seeds."""
    return f"{SCALE}: {sentence}"


def ours(sentence: str) -> str:
    """A note: what the papers leave undefined or do not have."""
    return OURS + sentence


def ordered(findings: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(kind, its sentences without the prefix), kinds in order, empty ones left out; a sentence of no kind is OTHER."""
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for finding in findings:
        kind, colon, sentence = finding.partition(": ")
        if not colon or kind not in groups:
            kind, sentence = OTHER, finding
        if sentence not in groups[kind]:  # several tables may state the same scale
            groups[kind].append(sentence)
    return [(kind, group) for kind, group in groups.items() if group]
