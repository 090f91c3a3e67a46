"""Steps, refreshes and bytes where whole rows are isolated for good, beside the element-wise form with the same masks.

    python -m bench.isolated_rows            measures and writes bench/results/isolated-rows-*.json
    python -m bench.isolated_rows --quick    a smoke run: a tiny matrix, nothing written

Both optimizers step the same weights and gradients in turn, and select 1 % beside the rows; ratios are taken pair by pair.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import results
from bench.gpu_device import CpuDevice
from bench.gpu_timing import Effort, copy_gbps, step_bytes
from bench.side_by_side import parameters, time_pair
from bench.sources import changed_since
from epi_kernels import MaskedEMAAdamW
from epi_kernels.markdown import table
from epi_kernels.optim.compact import runs_of

GROUP, PREFIX = "isolated-rows", "isolated-rows"
BESIDE = 'isolation_granularity="element", the same masks'
SHARES = (0.1, 0.5, 0.9)
LAYOUTS = ("contiguous", "random")  # which rows: the first, or any
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16, 8-bit states": (torch.bfloat16, {"state_dtype": "int8"}),
}


def rows_of(shape: tuple[int, int], share: float, layout: str) -> Tensor:
    """bool of ``shape``"""
    rows = shape[0]
    order = torch.arange(rows)
    if layout == "random":
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(rows, dtype=torch.bool)
    chosen[order[: round(share * rows)]] = True
    return chosen[:, None].expand(shape)


def made(params: Sequence[Tensor], mask: Tensor, granularity: str, **options: Any) -> MaskedEMAAdamW:
    """Stepped, with a mask that a refresh selected beside the rows."""
    optimizer = MaskedEMAAdamW(
        params, lr=1e-6, mask_interval=None, isolation_granularity=granularity, **options
    )
    optimizer.set_isolation_mask(params[0], mask, persistent=True)
    optimizer.step()
    optimizer.refresh_isolation_mask()
    optimizer.step()
    return optimizer


def timed(ours: Callable[[], Any], beside: Callable[[], Any], pairs: int) -> dict[str, Any]:
    times = [time_pair(CpuDevice(), beside, ours, swap=bool(i % 2)) for i in range(pairs + 1)][1:]
    beside_ms, ours_ms = zip(*times, strict=True)
    return {
        "ours_ms": results.percentiles(ours_ms),
        "beside_ms": results.percentiles(beside_ms),
        "ratio": results.percentiles(results.paired_ratios(ours_ms, beside_ms)),
    }


def measure(kind: str, layout: str, share: float, shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    dtype, options = KINDS[kind]
    params = parameters([shape], dtype, CpuDevice())
    mask = rows_of(shape, share, layout)
    ours, beside = (made(params, mask, granularity, **options) for granularity in ("row", "element"))
    gc.collect()
    step = timed(ours.step, beside.step, pairs)
    refresh = timed(ours.refresh_isolation_mask, beside.refresh_isolation_mask, pairs)
    elements, state = params[0].numel(), ours.state_bytes()["total"]
    runs = runs_of(ours.state[params[0]])
    bytes_per_element = step_bytes(dtype.itemsize * (1 - share), state / elements)  # of what can move
    return {
        "name": f"rows-{kind.replace(', ', '-').replace(' ', '-')}-{layout}-{round(100 * share)}",
        "kind": kind,
        "layout": layout,
        "share": share,
        "runs": None if runs is None else len(runs),
        "dtype": str(dtype).removeprefix("torch."),
        "elements": elements,
        "rounds": pairs,
        **step,
        "refresh": refresh,
        "state_bytes": state,
        "beside_state_bytes": beside.state_bytes()["total"],
        "bytes_per_element": bytes_per_element,
        "ns_per_element": 1e6 * step["ours_ms"]["p50"] / elements,
        "gbps": bytes_per_element * elements / (1e6 * step["ours_ms"]["p50"]),
    }


def run(shape: tuple[int, int], pairs: int, copy_bytes: int, complete: bool) -> list[dict[str, Any]]:
    copy = copy_gbps(CpuDevice(), Effort(copy_bytes=copy_bytes, warm_up=2))
    shared = results.unjudged(GROUP, copy["p50"], torch.get_num_threads(), backend="cpu", complete=complete)
    shared |= {"tensors": 1, "beside": BESIDE}
    rows = []
    for kind in KINDS:
        for layout in LAYOUTS:
            for share in SHARES:
                found = measure(kind, layout, share, shape, pairs)
                rows.append(found | {"copy_share": found["gbps"] / copy["p50"]} | shared)
    return rows


def section(folder: Path = results.RESULTS) -> str:
    """The table of the newest whole run."""
    rows = results.newest_complete(folder, PREFIX)
    if rows is None:
        return "Not measured yet: `python -m bench.isolated_rows`."
    lines = [
        [
            f"{row['kind']}, {row['layout']} rows",
            f"{row['share']:.0%}",
            f"{row['beside_state_bytes'] / row['elements']:.3f}",
            f"{row['state_bytes'] / row['elements']:.3f}",
            f"{row['beside_ms']['p50']:.2f}",
            f"{row['ours_ms']['p50']:.2f}",
            f"{row['ratio']['p50']:.2f} ({row['ratio']['p20']:.2f} to {row['ratio']['p80']:.2f})",
            f"{row['refresh']['ratio']['p50']:.2f}",
        ]
        for row in rows
    ]
    header = [
        "weights, which rows",
        "isolated",
        "state by elements, B",
        "by rows, B",
        "step by elements, ms",
        "by rows, ms",
        "step, ratio",
        "refresh, ratio",
    ]
    first = rows[0]
    caption = (
        f"{first['elements']:,} elements in rows of 4,096; bytes of state a parameter; {first['machine']['cpu']}, "
        f"{first['threads']} threads, `cpu` backend, {first['date'][:10]}, commit {first['commit']}"
        + (" with uncommitted changes" if first["dirty"] else "")
        + changed_since(first, "cpu")
    )
    return f"{caption}.\n\n{table(header, lines, 'lrrrrrrr')}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.isolated_rows", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tiny matrix; nothing is written")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (2)")
    parser.add_argument("--out", type=Path, help="folder of the result file (whole runs: bench/results)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape, pairs, copy_bytes = ((64, 256), 2, 1 << 16) if args.quick else ((4096, 4096), 25, 800_000_000)
    rows = run(shape, pairs, copy_bytes, complete=not args.quick)
    for row in rows:
        print(
            f"{row['name']:<48} {row['ours_ms']['p50']:8.2f} ms  {row['ratio']['p50']:5.2f} of element-wise  refresh "
            f"{row['refresh']['ratio']['p50']:5.2f}  {row['state_bytes'] / row['beside_state_bytes']:.3f} of its bytes"
        )
    out = args.out or (None if args.quick else results.RESULTS)
    print("not written" if out is None else f"written: {results.append(rows, out, prefix=PREFIX)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
