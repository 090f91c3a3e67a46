"""The README's table of bench.side_by_side's newest whole run, on a CPU or on a GPU."""

from __future__ import annotations

from pathlib import Path

from bench import results
from bench.markdown import Row, alike, contender_name, count, mib, milliseconds, ratio
from bench.sources import changed_since
from epi_kernels.architectures import ARCHITECTURES
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
    said = {row["contender"]: row["skipped"] for row in one if "skipped" in row}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        others = [row for row in rows if row["dtype"] == dtype and row["list"] != lists[0]]
        if others:
            parts += [_lists_line(others, dtype), _ratios(others, said)]
    return "\n\n".join(parts)


def _lists_line(rows: list[Row], dtype: str) -> str:
    line = f"Other parameter lists, {dtype} weights; every optimizer of a column steps over the same tensors."
    if any("needs_bytes" in row for row in rows):
        line += (
            " 'Needs': did not run, so many bytes of weights, gradients, states and temporaries were not there, counted by"
            " what the optimizer took over a shorter list."
        )
    return line


def _ratios(rows: list[Row], said: dict[str, str]) -> str:
    """A line a contender, a column a list. ``said``: why some did not run, which stands elsewhere."""
    columns = {row["list"]: _list_title(row) for row in rows}
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        known = row.get("skipped") == said.get(row["contender"])
        cell = ratio(row) if "ratio" in row else "-" if known else _why_not(row)
        lines.setdefault(row["contender"], {})[row["list"]] = cell
    cells = [[name, *(found.get(column, "-") for column in columns)] for name, found in lines.items()]
    return table(["step, of torch fused", *columns.values()], cells, "l" + "r" * len(columns))


def _why_not(row: Row) -> str:
    if "needs_bytes" in row:
        return f"needs {row['needs_bytes'] / 1e9:.1f} GB"
    return row["skipped"].split(":")[0]


def _list_title(row: Row) -> str:
    """What the list is, and how much of an architecture; older records have decoder layers alone and do not say how many."""
    size = f"{row['elements']:,} elements in {row['tensors']:,} tensors"
    if "of_layers" in row:
        share = f"{row['layers']} of {row['of_layers']} layers"
        share += ", embedding, norm and head" if row["ends"] else ", no embedding, no head"
        return f"{row['list']}: {share}; {size}, of {row['of_elements']:,}"
    share = "decoder layers alone; " if row["list"] in ARCHITECTURES else ""
    return f"{row['list']}: {share}{size}"
