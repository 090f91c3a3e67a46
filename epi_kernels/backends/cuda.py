"""The four stages in CUDA C++ (csrc/cuda): a fallback where Triton is absent or refused.

A launch covers many tensors. The host divides their elements among programs (blocks of threads):
chunks of CHUNK elements of one tensor are laid end to end and every program gets a run of them, so
that the work is even whatever the sizes. What the kernels read (pointers, scalars, division of the
work) goes to the device in one pinned, asynchronous copy a launch; nothing waits for the device.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends import table as table_
from epi_kernels.backends.batch import StepBatch
from epi_kernels.backends.operators import cuda_operators
from epi_kernels.reference.rounding import mixed_seed
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch

CHUNK = 4096  # kChunk of csrc/cuda/table.h
MIN_CAPABILITY = (7, 5)
ALIGNED = 256  # kAligned: every tensor of the row that the kernel touches starts on 16 bytes
STATS_PARTIAL_WORDS = 4  # StatsPartial, in float64 words

# Enough programs to fill a large GPU several times over, so that its blocks finish together, and
# few enough that the partial statistics stay below 300 KiB. Reasoned, not measured.
MAX_PROGRAMS = 8192
# A program's elements stay below 2^31, whatever the total: kernels count them in 32 bits.
MAX_CHUNKS_OF_PROGRAM = 1 << 18

_VECTOR_BYTES = 16
_STEP_POINTERS = [
    table_.PARAM,
    table_.GRAD,
    table_.EXP_AVG,
    table_.EXP_AVG_SQ,
    table_.IMPORTANCE,
    table_.WEIGHT_CORRECTION,
]
_REFRESH_POINTERS = [table_.EXP_AVG_SQ, table_.IMPORTANCE]


@dataclass(slots=True)
class Layout:
    """Division of the work over rows of these sizes (and, for statistics, of these layers)."""

    order: np.ndarray  # [n] row numbers: those with elements, consecutive within a layer
    programs: np.ndarray  # [n_programs + 1, 2] int64: row (in this order), element
    runs: np.ndarray  # [n] int64: the run of each row; a run is one layer's consecutive rows
    run_slots: np.ndarray  # [n_runs, 3] int64: layer, first slot, slot after the last

    @property
    def n_programs(self) -> int:
        return len(self.programs) - 1

    @property
    def n_partials(self) -> int:
        return self.n_programs + len(self.run_slots)


def plan(numel: np.ndarray, layers: np.ndarray) -> Layout:
    """``numel``, ``layers``: [n] int64."""
    order = np.flatnonzero(numel)
    order = order[np.argsort(layers[order], kind="stable")]
    numel, layers = numel[order], layers[order]
    chunks = -(-numel // CHUNK)
    ends = np.cumsum(chunks)
    total = int(ends[-1]) if len(ends) else 0
    n_programs = min(total, max(MAX_PROGRAMS, -(-total // MAX_CHUNKS_OF_PROGRAM)))

    first_chunk = np.arange(n_programs, dtype=np.int64) * total // max(n_programs, 1)
    row = np.searchsorted(ends, first_chunk, side="right")
    programs = np.empty((n_programs + 1, 2), dtype=np.int64)
    programs[:-1, 0] = row
    programs[:-1, 1] = (first_chunk - (ends - chunks)[row]) * CHUNK
    programs[-1] = (len(order), 0)

    starts_run = np.ones(len(order), dtype=bool)
    starts_run[1:] = layers[1:] != layers[:-1]
    runs = np.cumsum(starts_run) - 1
    run_row = np.flatnonzero(starts_run)
    run_first = (ends - chunks)[run_row]
    run_last = np.append(run_first[1:], total)[: len(run_row)] - 1
    number = np.arange(len(run_row), dtype=np.int64)
    run_slots = np.empty((len(run_row), 3), dtype=np.int64)
    run_slots[:, 0] = layers[run_row]
    if total:
        # the program of chunk c is the last p with floor(p * total / n_programs) <= c
        run_slots[:, 1] = ((run_first + 1) * n_programs - 1) // total + number
        run_slots[:, 2] = ((run_last + 1) * n_programs - 1) // total + number + 1
    return Layout(order, programs, runs.astype(np.int64), run_slots)


class Plans:
    """Layouts seen lately: a training run uses two or three over and over."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._plans: OrderedDict[tuple[bytes, bytes], Layout] = OrderedDict()

    def get(self, numel: np.ndarray, layers: np.ndarray) -> Layout:
        key = (numel.tobytes(), layers.tobytes())
        layout = self._plans.pop(key, None) or plan(numel, layers)
        self._plans[key] = layout
        if len(self._plans) > self._size:
            self._plans.popitem(last=False)
        return layout


class DeviceWork(NamedTuple):
    """A launch's tables on the device; views of one buffer."""

    layout: Layout
    rows: Tensor  # [n, COLUMNS] int64
    programs: Tensor  # [n_programs + 1, 2] int64
    runs: Tensor  # [n] int64
    run_slots: Tensor  # [n_runs, 3] int64
    scalars: Tensor  # [n, SCALAR_COLUMNS] fp32; empty outside the step, as hyper
    hyper: Tensor  # [n, 4] fp64: lr, beta1, beta2, eps


def upload(device: torch.device, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """int64 arrays as views of one tensor on the device, copied without waiting for it."""
    ends = np.cumsum([array.size for array in arrays]).tolist()
    on_gpu = device.type == "cuda"
    staging = torch.empty(ends[-1], dtype=torch.int64, device="cpu", pin_memory=on_gpu)
    host = staging.numpy()
    begin = 0
    for array, end in zip(arrays, ends, strict=True):
        host[begin:end] = array.reshape(-1)
        begin = end
    buffer = staging.to(device, non_blocking=True) if on_gpu else staging
    begins = [0, *ends[:-1]]
    return [
        buffer[begin:end].view(array.shape) for begin, end, array in zip(begins, ends, arrays, strict=True)
    ]


def aligned(rows: np.ndarray, pointers: list[int]) -> np.ndarray:
    """[n] bool: every one of these pointers is a multiple of 16 (0, no tensor, is one).

    Spans start at multiples of CHUNK elements, so this proves every full vector of the row.
    """
    return (np.bitwise_or.reduce(rows[:, pointers], axis=1) & (_VECTOR_BYTES - 1)) == 0


class CudaBackend:
    name = "cuda"
    counts_on_device = True
    captures = False
    places_runs = False

    def __init__(self) -> None:
        self._ops: Any = _load_ops()
        self._plans = Plans()
        self.description = f"csrc/cuda, {_build_record().get('reason', 'built')}"

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"the cuda backend runs on CUDA devices, not on {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"needs compute capability 7.5 or later, the device has {capability[0]}.{capability[1]}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the cuda backend has no {dtype} path"
        return None

    def step(
        self,
        batch: StepBatch,
        *,
        seed: int,
        stochastic_rounding: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        stats: LayerStats | None = None,
    ) -> None:
        if not batch.tensors:
            return
        pointers = batch.table(writes_grad=grad_scale is not None)
        if stats is not None:
            table_.fill_layers(pointers, batch.tensors)
        device = batch.tensors[0].param.device
        none = torch.empty(0, dtype=torch.float32, device=device)
        multiplier = none if grad_scale is None else torch.empty(1, dtype=torch.float32, device=device)
        constants = batch.constants()
        for kind, chosen in _by_dtypes(pointers.rows):
            of_kind = tuple(part[chosen] for part in constants)
            work = self._work(
                device, pointers.rows[chosen], of_kind, _STEP_POINTERS, by_layer=stats is not None
            )
            self._ops.cuda_prepare(
                work.rows,
                work.scalars,
                work.hyper,
                mixed_seed(seed),
                none if grad_scale is None else grad_scale,
                multiplier,
                none if found_inf is None else found_inf,
            )
            if not work.layout.n_programs:
                continue
            partials = _partials(work, wanted=stats is not None)
            moments = stats is not None and stats.with_moments
            self._ops.cuda_step(
                work.rows,
                work.programs,
                work.runs,
                work.scalars,
                kind,
                stochastic_rounding,
                multiplier,
                partials,
                moments,
            )
            if stats is not None:
                self._merge(work, partials, stats)
        pointers.finish()

    def accumulate(self, tensors: Sequence[ParamTensors], stats: LayerStats) -> None:
        def launch(work: DeviceWork) -> None:
            partials = _partials(work, wanted=True)
            self._ops.cuda_stats(work.rows, work.programs, work.runs, partials, stats.with_moments)
            self._merge(work, partials, stats)

        self._refresh(tensors, launch)

    def count(
        self, tensors: Sequence[ParamTensors], terms: ScoreTerms, search: KthSearch, sample_stride: int = 1
    ) -> None:
        def launch(work: DeviceWork) -> None:
            self._ops.cuda_count(
                work.rows,
                work.programs,
                terms.shift,
                terms.scale,
                search.keep_factor,
                search.domain,
                search.lo,
                search.hi,
                search.shift,
                search.done,
                sample_stride,
                torch.empty(len(terms.shift), 4, dtype=torch.float32, device=terms.shift.device),
                search.histogram,
            )

        self._refresh(tensors, launch)

    def select(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        thresholds: Tensor,
        keep_factor: float,
        drift: Tensor,
    ) -> None:
        def launch(work: DeviceWork) -> None:
            self._ops.cuda_select(
                work.rows,
                work.programs,
                terms.shift,
                terms.scale,
                thresholds,
                keep_factor,
                terms.positive_only,
                torch.empty(len(terms.shift), 2, dtype=torch.float32, device=terms.shift.device),
                drift,
            )

        self._refresh(tensors, launch)

    def _refresh(self, tensors: Sequence[ParamTensors], launch: Callable[[DeviceWork], None]) -> None:
        """One launch over what the stages after the step read: u and the masks."""
        if not tensors:
            return
        pointers = table_.refresh_table(tensors)
        device = tensors[0].exp_avg_sq.device
        work = self._work(device, pointers.rows, (), _REFRESH_POINTERS, by_layer=True)
        if work.layout.n_programs:
            launch(work)
        pointers.finish()

    def _work(
        self,
        device: torch.device,
        rows: np.ndarray,
        constants: tuple[np.ndarray, ...],  # StepBatch.constants; () outside the step
        pointers: list[int],
        *,
        by_layer: bool,
    ) -> DeviceWork:
        layers = rows[:, table_.LAYER] if by_layer else np.zeros(len(rows), dtype=np.int64)
        layout = self._plans.get(np.ascontiguousarray(rows[:, table_.NUMEL]), np.ascontiguousarray(layers))
        # rows without an element come last: no program sees them, but their ``step`` goes on
        order = np.concatenate([layout.order, np.flatnonzero(rows[:, table_.NUMEL] == 0)])
        rows = rows[order]
        rows[:, table_.FLAGS] |= np.where(aligned(rows, pointers), ALIGNED, 0)
        runs = np.zeros(len(rows), dtype=np.int64)
        runs[: len(layout.runs)] = layout.runs
        words = [_as_words(part[order]) for part in constants]
        device_rows, programs, device_runs, run_slots, *step_only = upload(
            device, [rows, layout.programs, runs, layout.run_slots, *words]
        )
        scalars, hyper = step_only or (device_rows[:0], device_rows[:0])
        return DeviceWork(
            layout,
            device_rows,
            programs,
            device_runs,
            run_slots,
            scalars.view(torch.float32),
            hyper.view(torch.float64),
        )

    def _merge(self, work: DeviceWork, partials: Tensor, stats: LayerStats) -> None:
        self._ops.cuda_merge_stats(
            work.run_slots,
            partials,
            stats.with_moments,
            stats.minimum,
            stats.maximum,
            stats.nonfinite,
            stats.moments,
        )


def _as_words(values: np.ndarray) -> np.ndarray:
    """The bytes of a row-major array as int64, filled up with zeros."""
    padded = np.zeros(-(-values.nbytes // 8), dtype=np.int64)
    padded.view(values.dtype)[: values.size] = values.reshape(-1)
    return padded


def _by_dtypes(rows: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """(kind, its rows) of each combination of dtypes: one launch each, nearly always one in all.

    kind: param + 3 * state + 12 * importance, each 0 float32, 1 bfloat16, 2 8-bit (of weights: bfloat16 with a
    correction beside it), of states 3 4-bit; the importance one more, 0 where it is shared.
    """

    def stored(bf16: int, int8: int = 0) -> np.ndarray:
        return (flags & bf16 != 0) + 2 * (flags & int8 != 0)

    flags, own = rows[:, table_.FLAGS], rows[:, table_.IMPORTANCE] != 0
    corrected = rows[:, table_.WEIGHT_CORRECTION] != 0
    param = np.where(corrected, 2, stored(table_.PARAM_BF16))
    state = np.where(flags & table_.STATE_INT4 != 0, 3, stored(table_.STATE_BF16, table_.STATE_INT8))
    kinds = param + 3 * state
    importance = 1 + stored(table_.IMPORTANCE_BF16, table_.IMPORTANCE_INT8)
    kinds = kinds + 12 * np.where(own, importance, 0)
    distinct = np.unique(kinds).tolist()
    if len(distinct) == 1:
        return [(distinct[0], slice(None))]
    return [(kind, kinds == kind) for kind in distinct]


def _partials(work: DeviceWork, *, wanted: bool) -> Tensor:
    """Room for StatsPartials: [n_partials, STATS_PARTIAL_WORDS] float64 words."""
    rows = work.layout.n_partials if wanted else 0
    return torch.empty(rows, STATS_PARTIAL_WORDS, dtype=torch.float64, device=work.rows.device)


def _build_record() -> dict[str, Any]:
    """What setup.py decided about the CUDA part."""
    try:
        info = json.loads((Path(__file__).parents[1] / "_build_info.json").read_text())
        return dict(info["cuda"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _load_ops() -> Any:
    """The operators of the CUDA library; ImportError with the reason where they cannot run."""
    try:
        importlib.import_module("epi_kernels._C_cuda")
    except ImportError as error:
        reason = _build_record().get("reason", "the extension is not built (make build)")
        built = str(reason).startswith("built")
        raise ImportError(f"the CUDA library does not load: {error}" if built else reason) from error
    if not torch.cuda.is_available():
        raise ImportError("no CUDA device")
    return cuda_operators()
