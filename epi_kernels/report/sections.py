"""A run's log as sections of a page: pure functions from events to text, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from epi_kernels.finetune.compare import NAMES
from epi_kernels.text import human_bytes, span

from . import figures
from .figures import COLORS, Series
from .page import Figure, Note, Section, Table, Tiles

SMOOTHED_ABOVE = 60  # steps: below that the raw training loss is readable
HEATMAP_ROWS = 60

Events = Sequence[Mapping]


def _of(events: Events, kind: str) -> list[Mapping]:
    return [event for event in events if event["event"] == kind]


def _series(events: Events, kind: str, key: str) -> tuple[list[int], list[float]]:
    pairs = [
        (event["step"], event[key]) for event in _of(events, kind) if isinstance(event.get(key), (int, float))
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean of up to `window` values: no value looks ahead."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        result.append(total / min(index + 1, window))
    return result


def _loss_text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def _change(before: object, after: object) -> str:
    """ "-" where there is no such data, or the loss was no number."""
    if isinstance(before, (int, float)) and isinstance(after, (int, float)):
        return f"{after - before:+.4f}"
    return "-"


def headline(runs: Mapping[str, Events]) -> Section:
    main = runs["isolation"]
    start, ends = main[0], _of(main, "end")
    evals = _of(main, "eval")
    tiles = [
        (
            "steps",
            f"{max((event.get('step', 0) for event in main), default=0)} of {start['steps']}",
            f"{start['parameters']:,} parameters, {start['dtype']}",
        )
    ]
    if evals and isinstance(evals[0]["validation_loss"], (int, float)):
        tiles.append(
            (
                "validation loss",
                f"{_loss_text(evals[0]['validation_loss'])} → {_loss_text(evals[-1]['validation_loss'])}",
                "nats an answer token",
            )
        )
    if evals and isinstance(evals[0]["retain_loss"], (int, float)):
        change = _change(evals[0]["retain_loss"], evals[-1]["retain_loss"])
        tiles.append(
            (
                "old-data loss",
                f"{_loss_text(evals[0]['retain_loss'])} → {_loss_text(evals[-1]['retain_loss'])}",
                f"change {change}",
            )
        )
    refreshed = _of(main, "refresh")
    if refreshed:
        last = refreshed[-1]
        share = last["isolated"] / max(1, start["parameters"])
        tiles.append(
            ("isolated", f"{share:.2%}", f"{last['isolated']:,} weights after {len(refreshed)} refreshes")
        )
    blocks: list = [Tiles(tiles)]
    if not ends:
        blocks.append(Note("The run is not finished: this page shows what its log holds so far."))
    if not refreshed:
        blocks.append(Note("No refresh happened: nothing was isolated in this run."))
    blocks.append(_outcomes(runs))
    return Section("Outcome", blocks)


def _outcomes(runs: Mapping[str, Events]) -> Table:
    rows = []
    for label, events in runs.items():
        evals = _of(events, "eval")
        if not evals:
            continue
        before, after = evals[0]["retain_loss"], evals[-1]["retain_loss"]
        validation = [_loss_text(evals[0]["validation_loss"]), _loss_text(evals[-1]["validation_loss"])]
        rows.append(
            [NAMES[label], *validation, _loss_text(before), _loss_text(after), _change(before, after)]
        )
    headers = ["optimizer", "validation before", "after", "old data before", "after", "change"]
    if all(row[3] == row[4] == "-" for row in rows):
        return Table(headers[:3], [row[:3] for row in rows], "Mean cross-entropy in nats an answer token.")
    return Table(
        headers,
        rows,
        "Mean cross-entropy in nats an answer token; a positive change on old data is forgetting.",
    )


def losses(runs: Mapping[str, Events]) -> Section:
    series = []
    for index, (label, events) in enumerate(runs.items()):
        steps, values = _series(events, "step", "loss")
        suffix = f" ({NAMES[label]})" if len(runs) > 1 else ""
        smoothed = len(values) > SMOOTHED_ABOVE
        if smoothed and len(runs) == 1:
            series.append(Series("", steps, values, COLORS[index], width=0.7, alpha=0.25))
        shown = smooth(values, max(5, len(values) // 40)) if smoothed else values
        if steps:
            series.append(Series("training" + suffix, steps, shown, COLORS[index], width=1.2, alpha=0.75))
        steps, values = _series(events, "eval", "validation_loss")
        if steps:
            series.append(
                Series(
                    "validation" + suffix,
                    steps,
                    values,
                    COLORS[index],
                    "--" if len(runs) > 1 else "-",
                    marker="o",
                )
            )
    if len(runs) == 1 and series:
        series[-1].color = COLORS[1] if series[-1].label.startswith("validation") else COLORS[0]
    marks = [event["step"] for event in _of(runs["isolation"], "refresh")]
    image = figures.lines(series, ylabel="loss (nats an answer token)", marks=marks, mark_label="refresh")
    return Section(
        "Training and validation loss",
        [
            Figure(
                image,
                "Loss by step. Thin vertical lines are refreshes of the isolation mask; a long training curve is a trailing mean.",
            )
        ],
    )


def old_data(runs: Mapping[str, Events]) -> Section | None:
    series = []
    for index, (label, events) in enumerate(runs.items()):
        steps, values = _series(events, "eval", "retain_loss")
        if steps:
            series.append(Series(NAMES[label], steps, values, COLORS[index], marker="o"))
    if not series:
        return None
    marks = [event["step"] for event in _of(runs["isolation"], "refresh")]
    image = figures.lines(series, ylabel="loss on old data (nats a token)", marks=marks, mark_label="refresh")
    return Section(
        "Old-data loss", [Figure(image, "Loss on the --retain data: where it rises, old abilities are lost.")]
    )


def isolation(runs: Mapping[str, Events]) -> Section | None:
    refreshed = _of(runs["isolation"], "refresh")
    if not refreshed:
        return None
    blocks: list = []
    names = list(dict.fromkeys(row["name"] for event in refreshed for row in event["layers"]))
    last = {row["name"]: row["elements"] for row in refreshed[-1]["layers"]}
    left_out = len(names) - HEATMAP_ROWS
    if left_out > 0:
        names = sorted(sorted(names, key=lambda name: -last.get(name, 0))[:HEATMAP_ROWS], key=names.index)
    shares = {
        (event["step"], row["name"]): row["isolated"] / max(1, row["elements"])
        for event in refreshed
        for row in event["layers"]
    }
    steps = [event["step"] for event in refreshed]
    image = figures.heatmap(
        [[shares.get((step, name)) for step in steps] for name in names],
        names,
        steps,
        color_label="isolated share of the layer",
        gamma=0.5,
    )
    note = f" The {left_out} smallest layers are left out." if left_out > 0 else ""
    blocks.append(
        Figure(image, f"Isolated share per layer after each refresh (colours by the square root).{note}")
    )
    # The first mask follows an empty one: its overlap, 0, is no drift.
    drift = [event for event in refreshed if event["isolated"] - event["entered"] + event["released"] > 0]
    if drift:
        line = Series(
            "Jaccard", [event["step"] for event in drift], [event["jaccard"] for event in drift], marker="o"
        )
        image = figures.lines([line], ylabel="Jaccard of successive masks", ylim=(0, 1.03), height=2.8)
        blocks.append(
            Figure(
                image, "Overlap of each mask with the one before: 1 is no change, 0 is no element in common."
            )
        )
    table = [
        [
            event["step"],
            f"{event['isolated']:,}",
            f"{event['entered']:,}",
            f"{event['released']:,}",
            f"{event['jaccard']:.3f}",
            _threshold(event["threshold"]),
            event["ties"],
            event["nonfinite"],
        ]
        for event in (refreshed if len(refreshed) <= 12 else [*refreshed[:3], *refreshed[-9:]])
    ]
    caption = (
        "Refreshes" if len(refreshed) <= 12 else f"The first 3 and the last 9 of {len(refreshed)} refreshes"
    )
    blocks.append(
        Table(
            ["after step", "isolated", "entered", "released", "Jaccard", "threshold", "ties", "non-finite"],
            table,
            caption,
        )
    )
    return Section("What was isolated", blocks)


def _threshold(value: object) -> str:
    if isinstance(value, dict):
        numbers = [one for one in value.values() if isinstance(one, (int, float)) and math.isfinite(one)]
        return f"{min(numbers):.3g} - {max(numbers):.3g}" if numbers else "-"
    return f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def memory(runs: Mapping[str, Events]) -> Section:
    start = runs["isolation"][0]
    planned = start["memory"]
    count = max(1, planned["parameters"])
    ends = [event["state_bytes"] for event in runs["isolation"] if "state_bytes" in event]
    ours = ends[-1]["total"] if ends else planned["ours"]
    labels = ["torch AdamW", "this run", "EPI as published"]
    values = [planned["adamw"], ours, planned["epi_as_published"]]
    rows = [
        [label, human_bytes(value), f"{value / count:.3f}"]
        for label, value in zip(labels, values, strict=True)
    ]
    blocks: list = [
        Figure(
            figures.bars(
                labels, [("", [value / count for value in values])], ylabel="bytes a parameter", height=2.8
            ),
            "Bytes a parameter that the optimizer owns.",
        )
    ]
    blocks.append(Table(["optimizer state", "bytes", "a parameter"], rows))
    if ends:
        kinds = [[kind, human_bytes(value)] for kind, value in ends[-1].items() if value]
        blocks.append(Table(["this run's state", "bytes"], kinds))
    return Section("Optimizer memory", blocks)


def settings(runs: Mapping[str, Events]) -> Section:
    start = runs["isolation"][0]
    counts = [
        [name, *(f"{one[key]:,}" for key in ("examples", "tokens", "answer_tokens", "truncated", "dropped"))]
        for name, one in start["data"].items()
    ]
    options = [[name, "-" if value is None else value] for name, value in sorted(start["options"].items())]
    versions = [[name, value] for name, value in start["environment"].items()]
    blocks: list = [
        Table(["data", "examples", "tokens", "answers", "truncated", "dropped"], counts),
        Table(["made with", ""], versions),
        Table(["option", "value"], options),
    ]
    resumed = [event["step"] for event in _of(runs["isolation"], "resume")]
    if resumed:
        blocks.insert(0, Note("Resumed after step " + ", ".join(map(str, resumed)) + "."))
    return Section("Data and settings", blocks)


def describe(name: str, runs: Mapping[str, Events]) -> tuple[str, list[Section], str]:
    """(title, sections, subtitle) of the page of a run, as `page.build` takes them."""
    options = runs["isolation"][0]["options"]
    ratio = span(options["isolation_ratio"], options.get("adaptive_ratio"))  # older logs have neither
    every = span(options["mask_interval"], options.get("adaptive_interval"))
    subtitle = f"isolation ratio {ratio}, refreshed every {every} steps"
    if options.get("protect"):
        subtitle += "; importance carried over, isolated from the first step"
    for event in _of(runs["isolation"], "freeze"):
        subtitle += f"; {event['frozen']:,} weights of core regions frozen"
    parts = [headline(runs), losses(runs), old_data(runs), isolation(runs), memory(runs), settings(runs)]
    return f"Fine-tuning with isolation: {name}", [part for part in parts if part is not None], subtitle
