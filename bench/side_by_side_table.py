"""The README's table of bench.side_by_side's newest whole run."""

from __future__ import annotations

from pathlib import Path

from bench import results
from bench.markdown import Row, count, ratio
from epi_kernels.markdown import table


def _mib(n: float | None) -> str:
    return "-" if n is None else f"{n / 2**20:,.0f}"


def _milliseconds(ms: float) -> str:
    return f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}"


def _contender_line(row: Row) -> list[str]:
    name = f"**{row['contender']}**" if row["contender"].startswith("ours") else row["contender"]
    isolates = "yes" if row["isolates"] else "no"
    if "skipped" in row:
        return [name, isolates, "did not run", *["-"] * 6]
    refresh = row.get("refresh_ms")
    return [
        name,
        isolates,
        _milliseconds(row["ours_ms"]["p50"]),
        ratio(row),
        f"{row['gbps']:.1f} ({100 * row['copy_share']:.0f} %)",
        f"{row['state_bytes_per_element']:.3f}",
        _mib(row["step_peak_bytes"]),
        "-" if refresh is None else _milliseconds(refresh["p50"]),
        _mib(row.get("refresh_peak_bytes")),
    ]


def text(folder: Path = results.RESULTS) -> str:
    """The newest whole run of bench.side_by_side: one tensor in full, the other lists as ratios."""
    rows = results.newest_complete(folder, "side-by-side")
    if rows is None:
        return "Not measured yet: `make side-by-side`."
    first, machine = rows[0], rows[0]["machine"]
    where = machine["cpu"] if first["device"]["type"] == "cpu" else first["device"]["name"]
    lists = list(dict.fromkeys(row["list"] for row in rows))
    one = [row for row in rows if row["list"] == lists[0]]
    header = [
        "optimizer",
        "isolates",
        "step, ms",
        "of torch fused",
        "GB/s (of a copy)",
        "state, bytes a parameter",
    ]
    header += ["a step takes, MiB", "refresh, ms", "a refresh takes, MiB"]
    caption = (
        f"{where}, {first['threads']} threads, torch {first['versions']['torch']}, {first['date'][:10]}, commit "
        f"{first['commit']}. One tensor of {count(one[0]['elements'])} elements; 'of torch fused': paired with torch's "
        "fused AdamW over the same weights and gradients; GB/s: of the bytes that a step must move at least."
    )
    parts = [caption, table(header, list(map(_contender_line, one)), "llrrrrrrr")]
    notes = {row["contender"]: row["note"].removeprefix("isolates nothing").removeprefix("; ") for row in one}
    parts.append(
        "What is unlike. " + "; ".join(f"{name}: {note}" for name, note in notes.items() if note) + "."
    )
    skipped = [f"{row['contender']}: {row['skipped'].rstrip('.')}" for row in one if "skipped" in row]
    if skipped:
        parts.append("Did not run. " + "; ".join(skipped) + ".")
    if len(lists) > 1:
        ratios: dict[str, list[str]] = {}
        for name in lists[1:]:
            for row in (row for row in rows if row["list"] == name):
                ratios.setdefault(row["contender"], [row["contender"]]).append(
                    ratio(row) if "ratio" in row else "-"
                )
        sizes = {row["list"]: f"{row['list']} ({row['tensors']:,}: {row['elements']:.2g})" for row in rows}
        header = ["step, of torch fused", *(sizes[name] for name in lists[1:])]
        parts.append(
            "Other parameter lists (tensors: elements), of an architecture as many decoder layers as fit, one at least; what takes "
            "seconds a step sits them out:"
        )
        parts.append(table(header, list(ratios.values()), "l" + "r" * (len(lists) - 1)))
    return "\n\n".join(parts)
