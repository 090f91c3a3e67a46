"""make side-by-side: every configuration of ours beside torch's, the peers' and EPI as published, in one run.

    python -m bench.side_by_side                 the lists that fit, on the CPU or, where there is one, the GPU
    python -m bench.side_by_side --quick         a smoke run: tiny lists, nothing written
    python -m bench.side_by_side --time-limit 540  as many lists as fit in the time; the same command goes on
    python -m bench.side_by_side --only torchao  contenders whose name holds a word

Every contender steps in turn with torch's fused AdamW over the same weights and gradients; ratios are taken pair by
pair. A peer that is not installed, or cannot run here, becomes a row that says why. Peers install with

    .venv/bin/python -m pip install flashoptim torchao bitsandbytes torch-optimi deepspeed
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import results
from bench.bench_memory import peak_mib
from bench.contenders import CONTENDERS, LR, REFERENCE, Contender
from bench.gpu_device import CpuDevice, Device, open_device
from bench.gpu_record import slug
from bench.gpu_timing import MASK_BYTES, Effort, copy_gbps, imports_frozen, release, step_bytes
from bench.shapes import Architecture, ParameterList, Shape, architectures
from bench.side_by_side_fit import CPU_ELEMENTS, fitting, sits_out
from bench.slices import Kept, Slice, run_slices
from epi_kernels import MaskedEMAAdamW

GROUP, PREFIX = "side-by-side", "side-by-side"
PEERS = ("flashoptim", "torchao", "bitsandbytes", "torch-optimi", "deepspeed")
# Guessed: what a time limit leaves must hold the next slice.
COPY_SECONDS, ROW_SECONDS = 20, 6


@dataclass(frozen=True)
class Plan:
    elements: int = 100_000_000  # of one tensor
    list_elements: int = CPU_ELEMENTS  # the most of an architecture's list, on a CPU
    small_tensors: int = 1_000
    small_elements: int = 4_096
    seconds: float = 3.0  # a contender and list, about
    min_pairs: int = 3
    max_pairs: int = 60
    slow_seconds: float = 5.0  # a step: who would take longer sits a list out
    copy_bytes: int = 800_000_000
    architectures: bool = True

    def lists(self) -> dict[str, ParameterList | Architecture]:
        return {
            "one-tensor": ParameterList([(self.elements,)]),
            "small-tensors": ParameterList([(self.small_elements,)] * self.small_tensors),
            **(architectures() if self.architectures else {}),
        }


QUICK = Plan(
    65_536, small_tensors=3, seconds=0.0, min_pairs=1, max_pairs=1, copy_bytes=1 << 16, architectures=False
)


# ---------------------------------------------------------------- bytes


def stored_bytes(value: Any) -> int:
    """Bytes of the tensors in an optimizer's state; a subclass that wraps others counts those."""
    if isinstance(value, Mapping):
        return sum(map(stored_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(stored_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is not None and type(value) is not torch.nn.Parameter:
        inner, _ = flatten()
        return sum(stored_bytes(getattr(value, name)) for name in inner)
    return value.numel() * value.element_size()


def peak_bytes(device: Device, call: Callable[[], Any]) -> int | None:
    """What a call holds at most beyond what was there; on a CPU the resident set's rise, None off Linux."""
    if isinstance(device, CpuDevice):
        return int(peak_mib(call) * 2**20) if sys.platform == "linux" else None
    return device.peak_bytes(call)


# ---------------------------------------------------------------- one contender, one list


def parameters(shapes: Sequence[Shape], dtype: torch.dtype, device: Device) -> list[Tensor]:
    generator = torch.Generator(device.torch_device).manual_seed(0)
    params = []
    for shape in shapes:
        made = {"generator": generator, "device": device.torch_device, "dtype": dtype}
        param = torch.nn.Parameter(torch.randn(shape, **made).mul_(0.02))
        param.grad = torch.randn(shape, **made).mul_(1e-3)
        params.append(param)
    return params


def time_pair(
    device: Device, first: Callable[[], Any], second: Callable[[], Any], *, swap: bool
) -> tuple[float, float]:
    """Milliseconds of both; ``swap``: the second goes first, so that neither always follows the other."""
    if swap:
        second_ms, first_ms = device.time_round([second, first])
    else:
        first_ms, second_ms = device.time_round([first, second])
    return first_ms, second_ms


def measure(
    contender: Contender, params: Sequence[Tensor], reference: Callable[[], Any], device: Device, plan: Plan
) -> dict[str, Any]:
    """Figures of one contender, or ``skipped``: why there are none."""
    try:
        optimizer = contender.make(params)
        optimizer.step()
        if contender.refresh is not None:
            getattr(optimizer, contender.refresh)()
        optimizer.step()  # whatever a first step compiles or allocates is there now
        device.synchronize()
    except Exception as error:  # a peer may fail in any way; the row says how
        return {
            "skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        }
    start = time.perf_counter()
    device.time_round([reference, optimizer.step])
    pairs = min(max(int(plan.seconds / (time.perf_counter() - start)), plan.min_pairs), plan.max_pairs)
    gc.collect()
    gc.disable()
    try:
        times = [time_pair(device, reference, optimizer.step, swap=bool(i % 2)) for i in range(pairs)]
    finally:
        gc.enable()
    beside, ours = zip(*times)
    elements = sum(param.numel() for param in params)
    state = stored_bytes(optimizer.state)
    found: dict[str, Any] = {
        "rounds": pairs,
        "ours_ms": results.percentiles(ours),
        "beside_ms": results.percentiles(beside),
        "ratio": results.percentiles(results.paired_ratios(ours, beside)),
        "state_bytes_per_element": state / elements,
        "step_peak_bytes": peak_bytes(device, optimizer.step),
    }
    itemsize = params[0].element_size()
    mask = MASK_BYTES if isinstance(optimizer, MaskedEMAAdamW) else 0.0
    found["bytes_per_element"] = step_bytes(itemsize, state / elements, mask)
    found["ns_per_element"] = 1e6 * found["ours_ms"]["p50"] / elements
    found["gbps"] = found["bytes_per_element"] / found["ns_per_element"]
    if contender.refresh is not None:
        refresh = getattr(optimizer, contender.refresh)
        found["refresh_ms"] = results.percentiles([device.time_round([refresh])[0] for _ in range(3)])
        found["refresh_peak_bytes"] = peak_bytes(device, refresh)
    return found


# ---------------------------------------------------------------- the run


def list_slices(
    contenders: Sequence[Contender], device: Device, plan: Plan, complete: bool, done: Mapping[str, Any]
) -> list[Slice]:
    """What all rows share, then every list in each dtype. ``done``: results by slice, of those before among them."""
    slices = [Slice("copy", COPY_SECONDS, lambda _: {"shared": _shared(device, plan, complete)})]
    for name, listed in plan.lists().items():
        for dtype in REFERENCE:
            entered = [contender for contender in contenders if contender.weights == dtype]
            if entered:
                rows = partial(_list_rows, name, listed, dtype, entered, device, plan, done)
                slices.append(Slice(f"{name}-{_short(dtype)}", ROW_SECONDS * len(entered), rows))
    return slices


def _shared(device: Device, plan: Plan, complete: bool) -> dict[str, Any]:
    copy = copy_gbps(device, Effort(copy_bytes=plan.copy_bytes, warm_up=2))
    shared = results.unjudged(GROUP, copy["p50"], torch.get_num_threads(), backend="auto", complete=complete)
    shared["versions"] |= {name: version for name in PEERS if (version := installed(name))}
    return shared | {"device": device.facts()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@imports_frozen()
def _list_rows(
    name: str,
    listed: ParameterList | Architecture,
    dtype: torch.dtype,
    entered: Sequence[Contender],
    device: Device,
    plan: Plan,
    done: Mapping[str, Any],
    _seconds: float,
) -> dict[str, Any]:
    """Rows of one list. Nobody is stopped within one: who would take long sits it out."""
    taken = _largest(done)
    if isinstance(listed, Architecture):
        chosen = fitting(listed, dtype, device, taken, plan.list_elements)
    else:
        chosen = listed
    params = parameters(chosen.shapes, dtype, device)
    reference = torch.optim.AdamW(params, lr=LR, fused=True)
    reference.step()
    held = 2 * stored_bytes(params) + stored_bytes(reference.state)
    rows: list[dict[str, Any]] = []
    progress = tqdm(entered, unit="row", disable=None, leave=False)
    for contender in progress:
        progress.set_description(f"{name}: {contender.name}")
        row = {
            "name": f"{name}-{contender.slug}",
            "list": name,
            "contender": contender.name,
            "isolates": contender.isolates,
            "note": contender.note,
            "dtype": _short(dtype),
            "elements": chosen.elements,
            "tensors": len(chosen.shapes),
            **chosen.facts(),
            "beside": REFERENCE[dtype],
        }
        found = sits_out(taken.get(contender.name), chosen.elements, held, device, plan.slow_seconds)
        rows.append(row | (found or measure(contender, params, reference.step, device, plan)))
        if progress.disable:  # no terminal: a line a row instead
            print(f"    {len(rows)}/{len(entered)} {summary(rows[-1:])}", flush=True)
        release()
    del params, reference
    release()  # before the next list is made
    return {"rows": rows}


def _largest(done: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By contender: its row of the largest list so far."""
    taken: dict[str, dict[str, Any]] = {}
    for row in (row for result in done.values() for row in result.get("rows", ())):
        known = taken.get(row["contender"])
        if "gbps" in row and (known is None or known["elements"] < row["elements"]):
            taken[row["contender"]] = row
    return taken


def run(
    contenders: Sequence[Contender],
    device: Device,
    plan: Plan,
    complete: bool,
    kept: Kept,
    limit: float | None = None,
) -> list[dict[str, Any]] | None:
    """Rows of all lists; None where ``limit`` (seconds) ended it before.

    Raises:
        RuntimeError: a list could not be measured at all; the next call tries it again.
    """
    slices = list_slices(contenders, device, plan, complete, kept.done)
    left = run_slices(slices, kept, limit, lambda result: result.get("error", "done"))
    if failed := {name: result["error"] for name, result in kept.done.items() if "error" in result}:
        for name in failed:
            kept.forget(name)
        raise RuntimeError("; ".join(f"{name}: {error}" for name, error in failed.items()))
    if left:
        return None
    shared = kept.done["copy"]["shared"]
    rows = []
    for row in (row for piece in slices[1:] for row in kept.done[piece.name]["rows"]):
        share = {"copy_share": row["gbps"] / shared["copy_gbps"]} if "gbps" in row else {}
        rows.append(row | share | shared)
    return rows


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "skipped" in row:
            figures = f"not run: {row['skipped']}"
        else:
            figures = (
                f"{row['ours_ms']['p50']:10.2f} ms  {row['ratio']['p50']:7.2f} of torch fused  "
                f"{row['gbps']:6.1f} GB/s  {row['state_bytes_per_element']:.3f} B"
            )
        lines.append(f"{row['list']:<14} {row['contender']:<50} {figures}")
    return "\n".join(lines)


def _identity(device: Device, threads: int) -> str:
    """Of what a run goes on with: machine, commit and kernels, versions, number of threads."""
    origin = results.provenance()
    all_of_it = [origin[key] for key in ("machine", "versions", "dirty", "kernels")]
    all_of_it += [device.facts(), threads, *(installed(name) for name in PEERS)]
    digest = zlib.crc32(json.dumps(all_of_it, sort_keys=True).encode())
    return f"{slug(device.facts()['name'])}-{origin['commit']}-{digest:08x}"


def _number(text: str) -> int:
    return int(float(text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.side_by_side", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny lists, seconds; nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    parser.add_argument("--elements", type=_number, help="of one tensor (1e8)")
    parser.add_argument(
        "--list-elements",
        type=_number,
        help=f"the most of an architecture's list, on a CPU ({CPU_ELEMENTS:.1e})",
    )
    parser.add_argument("--only", metavar="WORD", help="contenders whose name holds it")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (2)")
    parser.add_argument("--out", type=Path, help="folder of the result file (whole runs: bench/results)")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="stop before the next list; the same command goes on",
    )
    args = parser.parse_args(argv)
    device = open_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(device, str):
        parser.error(device)
    torch.set_num_threads(args.threads)
    asked = {"elements": args.elements, "list_elements": args.list_elements}
    plan = QUICK if args.quick else Plan(**{name: n for name, n in asked.items() if n})
    contenders = [c for c in CONTENDERS if args.only is None or args.only.lower() in c.name.lower()]
    if not contenders:
        parser.error(f"no contender's name holds {args.only!r}: {', '.join(c.name for c in CONTENDERS)}")
    complete = plan == Plan() and args.only is None
    if args.time_limit is not None and not complete:
        parser.error("--time-limit: only a whole run is kept to go on with")
    with contextlib.ExitStack() as stack:
        folder = (
            (args.out or results.RESULTS) if complete else Path(stack.enter_context(TemporaryDirectory()))
        )
        folder.mkdir(parents=True, exist_ok=True)
        kept = Kept(folder / f"{PREFIX}-{_identity(device, args.threads)}.state.tmp")
        if kept.done:
            print(f"{len(kept.done)} slices were done before: {kept.path.name}")
        try:
            rows = run(contenders, device, plan, complete, kept, args.time_limit)
        except RuntimeError as error:
            print(f"error: {error}; the same command tries again", file=sys.stderr)
            return 1
        if rows is None:
            print("incomplete: the same command goes on")
            return 0
    if sys.stderr.isatty():
        print(summary(rows))
    out = args.out or (results.RESULTS if complete else None)
    if out is None:
        print("not written: not the whole run (--out FOLDER writes it)")
    else:
        print(f"written: {results.append(rows, out, prefix=PREFIX)}")
        kept.path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
