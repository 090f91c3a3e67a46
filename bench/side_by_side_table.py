"""The README's table of bench.side_by_side's newest whole run, on a CPU or on a GPU."""

from __future__ import annotations

from pathlib import Path

from bench import results
from bench.markdown import Row, alike, contender_name, count, mib, milliseconds, ratio
from bench.sources import changed_since
from epi_kernels.markdown import table

STATE = "state_bytes_per_element"


def newest(folder: Path, device: str = "cpu") -> list[Row] | None:
    """Rows of the newest whole run on a device of this type."""
    return results.newest_complete(folder, "side-by-side", device)


def _contender_line(row: Row, reference: Row) -> list[str]:
    head = [contender_name(row), "yes" if row["isolates"] else "no"]
    if "skipped" in row:
        figures = ["did not run", *["-"] * 6]
    else:
        refresh = row.get("refresh_ms")
        figures = [
            milliseconds(row["ours_ms"]["p50"]),
            ratio(row),
            f"{row['gbps']:.1f} ({100 * row['copy_share']:.0f} %)",
            f"{row[STATE]:.3f}",
            mib(row["step_peak_bytes"]),
            "-" if refresh is None else milliseconds(refresh["p50"]),
            mib(row.get("refresh_peak_bytes")),
        ]
    return [*head, *figures, *alike(row, reference, STATE)]


def _caption(first: Row, device: str) -> str:
    machine = first["machine"]
    if device == "cpu":
        where = f"{machine['cpu']} ({machine['isa']}), {first['threads']} threads"
    else:
        where = first["device"]["name"]
    commit = first["commit"] + (" with uncommitted changes" if first["dirty"] else "")
    return (
        f"{where}, torch {first['versions']['torch']}, {first['date'][:10]}, commit {commit}"
        f"{changed_since(first, device)}. One tensor of {count(first['elements'])} elements; 'of torch fused': paired with "
        "torch's fused AdamW over the same weights and gradients, which 'like' and 'unlike' compare with; GB/s: of the bytes "
        "that a step must move at least."
    )


def text(folder: Path = results.RESULTS, device: str = "cpu") -> str:
    """The newest whole run of bench.side_by_side: one tensor in full, the other lists as ratios."""
    rows = newest(folder, device)
    if rows is None:
        return "Not measured yet: `make side-by-side`."
    lists = list(dict.fromkeys(row["list"] for row in rows))
    one = [row for row in rows if row["list"] == lists[0]]
    named = {row["contender"]: row for row in one}
    header = [
        "optimizer",
        "isolates",
        "step, ms",
        "of torch fused",
        "GB/s (of a copy)",
        "state, bytes a parameter",
    ]
    header += ["a step takes, MiB", "refresh, ms", "a refresh takes, MiB", "like", "unlike"]
    lines = [_contender_line(row, named.get(row["beside"], {"contender": row["beside"]})) for row in one]
    parts = [_caption(one[0], device), table(header, lines, "llrrrrrrrll")]
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
