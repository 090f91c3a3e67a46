"""The results as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epi_kernels.demo import text
from epi_kernels.demo.protocol import ADAMW, ISOLATION, KEPT, RANDOM
from epi_kernels.report import figures
from epi_kernels.report.figures import Series
from epi_kernels.report.page import Code, Figure, Note, Section, Table, Tiles, build

COLOR = {
    ADAMW: figures.COLORS[0],
    KEPT: figures.COLORS[2],
    RANDOM: figures.COLORS[4],
    ISOLATION: figures.COLORS[1],
}
NAME = {ADAMW: "AdamW", KEPT: "A's moments kept, no mask", RANDOM: "random mask", ISOLATION: "isolation"}


def write_page(results: dict[str, Any], path: Path) -> Path:
    isolation = text.of_kind(results, ISOLATION)
    verdict = [text.verdict(results)] if results["learned"] else []
    sections = [
        Section(
            "What came out",
            [
                *([Note(text.QUICK)] if results["settings"]["quick"] else []),
                *([] if results["learned"] else [Note(text.learned(results))]),
                *([_tiles(results)] if results["learned"] and text.learned_b(results) else []),
                *(Note(s) if s.startswith(("The price", "No comparison")) else s for sentences in verdict for s in sentences),
            ],
        ),
        Section(
            "Scores",
            [
                Table(text.HEADERS, text.rows(results), "Percent; mean ± sd over seeds. <n, >n: on n seeds B lies below, above the frontier's runs."),
                text.DEFINITION,
                Figure(_trade(results), "Score on A against score on B after stage B, mean ± sd. Up and to the right is better; joined points are one optimizer at two learning rates."),
                Figure(_curve(results, "a"), "Task A while B is learned: what is left of it. Bands, on two of the lines: ± sd over seeds."),
                Figure(_curve(results, "b"), "Task B while it is learned."),
            ],
        ),
        Section("The mask", [text.drift(results), *_mask_figures(results)]),
        Section("Memory", [text.memory(results)]),
        Section(
            "How it was run",
            [text.method(results), text.learned(results), text.timing(results), Code("epi-kernels demo" + (" --quick" if results["settings"]["quick"] else ""))],
        ),
    ]  # fmt: skip
    subtitle = f"A small Llama learns sums, then string instructions. {isolation['label']}, n = {len(results['seeds'])} seeds."
    if results["settings"]["quick"]:
        subtitle = "A quick run, whose numbers show nothing. " + subtitle
    return build(path, "What isolation keeps, and what it costs", sections, subtitle)


def _tiles(results: dict[str, Any]) -> Tiles:
    isolation = text.of_kind(results, ISOLATION)
    best = max((a for a in results["arms"] if a["kind"] == ADAMW), key=lambda arm: arm["b"]["mean"])
    return Tiles(
        [
            ("A after B, isolation", f"{isolation['a']['mean']:.0f} %", f"before B: {text.plus_minus(results['before_summary']['a'])}"),
            (f"A after B, {best['label']}", f"{best['a']['mean']:.0f} %", text.plus_minus(best["a"])),
            ("dA@B over AdamW", text.plus_minus(isolation["gain"], True), f"over moments kept: {text.plus_minus(isolation['gain_over_kept'], True)}"),
            ("Price on B", text.plus_minus(results["price_on_b"][best["key"]], True), f"against {best['label']}"),
        ]
    )  # fmt: skip


def _trade(results: dict[str, Any]) -> str:
    before = results["before_summary"]
    series = [
        Series(
            "before stage B", [before["b"]["mean"]], [before["a"]["mean"]], figures.INK, "none", marker="s"
        )
    ]
    for kind in (ADAMW, KEPT, RANDOM, ISOLATION):
        arms = sorted((a for a in results["arms"] if a["kind"] == kind), key=lambda arm: arm["b"]["mean"])
        series.append(
            Series(
                NAME[kind] + ", lr " + " and ".join(f"{arm['lr']:g}" for arm in arms),
                [arm["b"]["mean"] for arm in arms],
                [arm["a"]["mean"] for arm in arms],
                COLOR[kind],
                xerr=[arm["b"]["sd"] for arm in arms],
                yerr=[arm["a"]["sd"] for arm in arms],
                marker="D" if kind == ISOLATION else "o",
            )
        )
    return figures.points(series, "score on B, %", "score on A, %", connect=True)


def _curve(results: dict[str, Any], task: str) -> str:
    seen: set[str] = set()
    banded = [text.of_kind(results, kind) for kind in (ADAMW, ISOLATION)]
    series = []
    for arm in results["arms"]:
        curve = arm["curve"]
        series.append(
            Series(
                arm["label"],
                [point["step"] for point in curve],
                [point[task]["mean"] for point in curve],
                COLOR[arm["kind"]],
                "--" if arm["kind"] in seen else "-",
                # Six bands hide each other; these two are the question.
                yerr=[point[task]["sd"] for point in curve] if arm in banded else None,
            )
        )
        seen.add(arm["kind"])
    return figures.lines(series, "step of stage B", f"score on {task.upper()}, %", ylim=(-2, 102))


def _mask_figures(results: dict[str, Any]) -> list[Figure]:
    rows = results["drift"]["refreshes"][1:]
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    chance = results["drift"]["chance"]
    drift = [
        Series("with the mask before", steps, [row["jaccard"]["mean"] for row in rows], yerr=[row["jaccard"]["sd"] for row in rows], marker="o"),
        Series("with the first mask", steps, [row["jaccard_first"]["mean"] for row in rows], yerr=[row["jaccard_first"]["sd"] for row in rows], marker="o"),
        Series("two random masks", steps, [chance] * len(steps), figures.SOFT, ":"),
    ]  # fmt: skip
    shares = [row["layers"] for row in results["drift"]["refreshes"]]
    names = [name.removeprefix("model.").removesuffix(".weight") for name in shares[0]]
    layers = figures.heatmap(
        [[share[name] for share in shares] for name in shares[0]],
        names,
        [0, *steps],
        "step of stage B",
        "isolated, %",
    )
    return [
        Figure(figures.lines(drift, "step of stage B", "Jaccard", ylim=(0, 1.02)), "Overlap of the isolation mask with the one before it and with the one B started from. How much of it is sampling noise is not measured here."),
        Figure(layers, "Isolated share of each tensor after every refresh, mean over seeds."),
    ]  # fmt: skip
