"""The Triton backend: tables of addresses and chunks, one launch a variant and stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import triton
from torch import Tensor

from epi_kernels.backends import capture
from epi_kernels.backends import table as _table
from epi_kernels.backends.batch import StepBatch
from epi_kernels.backends.triton import bounds as _bounds
from epi_kernels.backends.triton import mask as _mask
from epi_kernels.backends.triton import prepare as _prepare
from epi_kernels.backends.triton import stats as _stats
from epi_kernels.backends.triton import step as _step
from epi_kernels.backends.triton import threshold as _threshold
from epi_kernels.backends.triton.chunks import (
    Cache,
    DevicePlan,
    plan,
    sampled_elements,
    upload,
)
from epi_kernels.backends.triton.common import LAUNCH, THREADS
from epi_kernels.backends.triton.variants import (
    REFRESH_ROWS,
    RefreshVariant,
    StepVariant,
    refresh_forms,
    refresh_variants,
    step_forms,
    step_variants,
    u_kinds,
)
from epi_kernels.reference.rounding import mixed_seed
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch

INTERPRETED = not isinstance(_step.step_kernel, triton.JITFunction)

# Elements a program handles. A step moves 28 bytes for each and has its start-up, two dependent reads
# of the tables, behind it after a few of them; a refresh moves 4. Estimated for an H200, not measured.
STEP_CHUNK = 1 << 14
REFRESH_CHUNK = 1 << 16
MERGE_BLOCK = 256
LARGEST_BLOCK = 16 * THREADS
LARGEST_CHUNK = 1 << 16  # beyond it the packed counts of the mask stage would overflow


class TritonBackend:
    """``step_chunk``, ``refresh_chunk``: elements a program handles, multiples of LARGEST_BLOCK.

    The interpreter, there for tests, takes the smallest by itself, so that small tensors span several.
    """

    name = "triton"
    counts_on_device = True
    captures = True
    places_runs = True

    def __init__(self, step_chunk: int | None = None, refresh_chunk: int | None = None) -> None:
        self._step_chunk = step_chunk or (LARGEST_BLOCK if INTERPRETED else STEP_CHUNK)
        self._refresh_chunk = refresh_chunk or (LARGEST_BLOCK if INTERPRETED else REFRESH_CHUNK)
        for chunk in (self._step_chunk, self._refresh_chunk):
            if chunk % LARGEST_BLOCK or not 0 < chunk <= LARGEST_CHUNK:
                raise ValueError(
                    f"a chunk is a multiple of {LARGEST_BLOCK} up to {LARGEST_CHUNK}, not {chunk}"
                )
        self._cache = Cache()
        mode = ", interpreter" if INTERPRETED else ""
        self.description = f"Triton {triton.__version__}{mode}"

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the triton backend has no {dtype} path"
        if INTERPRETED:
            return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set: CPU tensors only"
        if device.type != "cuda":
            return "triton needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
        if torch.version.hip is not None:
            return "the kernels were never tried on ROCm"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "triton needs compute capability 8.0"
        return None

    def only_by_name(self, device: torch.device) -> str | None:
        """Why ``auto`` must not take this backend though it could run."""
        return "the interpreter is for tests" if INTERPRETED else None

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
        device = batch.tensors[0].param.device
        table = batch.table(writes_grad=grad_scale is not None)
        if stats is None:
            table.rows[:, _table.LAYER] = -1
        else:
            _table.fill_layers(table, batch.tensors)
        rows = np.zeros((len(table.rows), _prepare.ROW), dtype=np.int64)
        rows[:, : _table.COLUMNS] = table.rows
        scalars = rows.view(np.float32)[:, 2 * _prepare.SCALARS : 2 * _prepare.HYPER]
        hyper = rows.view(np.float64)[:, _prepare.HYPER : _prepare.LR]
        scalars[:, : _table.SCALAR_COLUMNS], hyper[:, :4] = batch.constants()
        for (start, stop), values in zip(batch.runs, batch.hypers(), strict=True):
            hyper[start:stop, 4] = values.weight_decay
            lr = batch.tensors[start].lr
            rows[start:stop, _prepare.LR] = 0 if lr is None else lr.data_ptr()
        # -(1 - beta1) * g is (1 - beta1) * -g to the bit, and g * g has no sign
        scalars[table.rows[:, _table.FLAGS] & _table.MAXIMIZE != 0, 1] *= -1

        forms, captured = step_forms(rows, self._step_chunk), batch.capturable
        with self._on(device):
            sizes, layers = rows[:, _table.NUMEL], rows[:, _table.LAYER]
            work = self._plan(
                sizes, forms, step_variants, layers, self._step_chunk, device, captured=captured
            )
            device_rows = self._rows_of(batch, rows, device)
            batch.device_tables = (device_rows, work) if batch.capturable else ()
            _prepare.prepare_kernel[(triton.cdiv(len(rows), _prepare.PREPARE_BLOCK),)](
                device_rows,
                len(rows),
                mixed_seed(seed),
                grad_scale,
                found_inf,
                UNSCALE=grad_scale is not None,
                SKIPPABLE=found_inf is not None,
                BLOCK=_prepare.PREPARE_BLOCK,
                **LAUNCH,
            )
            outputs = (None,) * 4
            if stats is not None:
                partials = work.partials if stats.with_moments else None
                outputs = (stats.minimum, stats.maximum, stats.nonfinite, partials)
            for variant, first, programs in work.launches:
                _step.step_kernel[(programs,)](
                    work.chunks[first:],
                    device_rows,
                    *outputs,
                    PARAM=variant.param,
                    STATE=variant.state,
                    IMPORTANCE=variant.importance,
                    CORRECTION=variant.correction,
                    FULL=variant.full,
                    STOCHASTIC=stochastic_rounding and variant.any_rounded,
                    SCATTERED=variant.scattered,
                    UNSCALE=grad_scale is not None,
                    STATS=_stats_kind(stats),
                    ROWS=variant.rows,
                    WIDTH=variant.width,
                    **LAUNCH,
                )
            self._merge_moments(work, stats)
            table.finish()

    def accumulate(self, tensors: Sequence[ParamTensors], stats: LayerStats) -> None:
        if not tensors:
            return
        with self._on(stats.minimum.device):
            work, rows = self._refresh_tables(tensors, stats.minimum.device)
            for variant, first, programs in work.launches:
                _stats.stats_kernel[(programs,)](
                    work.chunks[first:],
                    rows,
                    stats.minimum,
                    stats.maximum,
                    stats.nonfinite,
                    work.partials if stats.with_moments else None,
                    KIND=variant.kind,
                    FULL=variant.full,
                    STATS=_stats_kind(stats),
                    ROWS=REFRESH_ROWS,
                    **LAUNCH,
                )
            self._merge_moments(work, stats)

    def count(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        search: KthSearch,
        sample_stride: int = 1,
    ) -> None:
        if not tensors:
            return
        layers = terms.shift.numel()
        hysteresis = search.keep_factor != 1.0
        with self._on(terms.shift.device):
            work, rows = self._refresh_tables(tensors, terms.shift.device, sample_stride)
            limits = torch.empty(layers, 4, dtype=torch.float32, device=terms.shift.device)
            _bounds.count_bounds_kernel[(triton.cdiv(layers, _bounds.BOUNDS_BLOCK),)](
                limits,
                terms.shift,
                terms.scale,
                search.domain,
                search.lo,
                search.hi,
                layers,
                search.keep_factor,
                HYSTERESIS=hysteresis,
                BLOCK=_bounds.BOUNDS_BLOCK,
                **LAUNCH,
            )
            for variant, first, programs in work.launches:
                _threshold.count_kernel[(programs,)](
                    work.chunks[first:],
                    rows,
                    limits,
                    terms.shift,
                    terms.scale,
                    search.domain,
                    search.lo,
                    search.shift,
                    search.done.view(torch.uint8),
                    search.histogram,
                    sample_stride,
                    search.keep_factor,
                    KIND=variant.kind,
                    FULL=variant.full,
                    HYSTERESIS=hysteresis,
                    BINS=search.histogram.shape[1] - 1,
                    ROWS=REFRESH_ROWS,
                    **LAUNCH,
                )

    def select(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        thresholds: Tensor,
        keep_factor: float,
        drift: Tensor,
    ) -> None:
        if not tensors:
            return
        layers = terms.shift.numel()
        with self._on(terms.shift.device):
            work, rows = self._refresh_tables(tensors, terms.shift.device)
            limits = torch.empty(layers, 4, dtype=torch.float32, device=terms.shift.device)
            _bounds.select_bounds_kernel[(triton.cdiv(layers, _bounds.BOUNDS_BLOCK),)](
                limits,
                terms.shift,
                terms.scale,
                thresholds,
                layers,
                keep_factor,
                POSITIVE_ONLY=terms.positive_only,
                HYSTERESIS=keep_factor != 1.0,
                BLOCK=_bounds.BOUNDS_BLOCK,
                **LAUNCH,
            )
            for variant, first, programs in work.launches:
                _mask.select_kernel[(programs,)](
                    work.chunks[first:],
                    rows,
                    limits,
                    drift,
                    KIND=variant.kind,
                    FULL=variant.full,
                    HYSTERESIS=keep_factor != 1.0,
                    ROWS=REFRESH_ROWS,
                    **LAUNCH,
                )

    def _refresh_tables(
        self, tensors: Sequence[ParamTensors], device: torch.device, stride: int = 1
    ) -> tuple[DevicePlan, Tensor]:
        """Chunks and rows of the stages that read u; the passes of one refresh share the rows."""
        pointers = _table.refresh_table(tensors).rows
        own = pointers[:, _table.IMPORTANCE]
        rows = np.empty((len(tensors), _stats.REFRESH_ROW), dtype=np.int64)
        rows[:, _stats.U] = np.where(own != 0, own, pointers[:, _table.EXP_AVG_SQ])
        rows[:, _stats.ISOLATION_MASK] = pointers[:, _table.ISOLATION_MASK]
        rows[:, _stats.PERSISTENT_MASK] = pointers[:, _table.PERSISTENT_MASK]
        rows[:, _stats.U_LAYER] = pointers[:, _table.LAYER]
        own_scale, shared_scale = pointers[:, _table.IMPORTANCE_SCALE], pointers[:, _table.EXP_AVG_SQ_SCALE]
        rows[:, _stats.U_SCALE] = np.where(own != 0, own_scale, shared_scale)
        kinds = u_kinds(pointers[:, _table.FLAGS])
        forms = refresh_forms(rows[:, _stats.U], kinds, self._refresh_chunk)
        sizes = np.array([sampled_elements(n, stride) for n in pointers[:, _table.NUMEL].tolist()])
        layers = pointers[:, _table.LAYER]
        work = self._plan(sizes, forms, refresh_variants, layers, self._refresh_chunk, device)
        key = ("rows", rows.tobytes(), device, _stream(device))
        return work, self._cache.get(key, lambda: upload(rows, device))

    def _plan(
        self,
        sizes: np.ndarray,  # [n] int64, as the others
        forms: np.ndarray,  # [n, fields]
        variants: Callable[[np.ndarray], Sequence[StepVariant | RefreshVariant]],  # of forms
        layers: np.ndarray,
        chunk: int,
        device: torch.device,
        *,
        captured: bool = False,
    ) -> DevicePlan:
        # a graph is captured on another stream than the steps before it were taken on, which have been waited for
        stream = None if captured else _stream(device)
        key = (sizes.tobytes(), forms.tobytes(), layers.tobytes(), variants, chunk, device, stream)
        return self._cache.get(
            key, lambda: DevicePlan(plan(sizes.tolist(), variants(forms), layers.tolist(), chunk), device)
        )

    @staticmethod
    def _rows_of(batch: StepBatch, rows: np.ndarray, device: torch.device) -> Tensor:
        """The rows on the device. Of a batch that may be captured they stay while they say the same."""
        if not batch.capturable:
            return upload(rows, device)
        host = rows.tobytes()
        if batch.device_rows is None or host != batch.host_rows:
            if capture.capturing():
                raise RuntimeError(
                    "gradients, or what the groups say, have changed since the last step before the capture: step once with "
                    "the same memory (zero_grad(set_to_none=False)), then capture"
                )
            batch.host_rows, batch.device_rows = host, upload(rows, device)
        return batch.device_rows

    @staticmethod
    def _merge_moments(work: DevicePlan, stats: LayerStats | None) -> None:
        if stats is not None and stats.with_moments and len(work.spans):
            _stats.merge_moments_kernel[(len(work.spans),)](
                work.spans, work.partials, stats.moments, BLOCK=MERGE_BLOCK, **LAUNCH
            )

    @staticmethod
    def _on(device: torch.device) -> AbstractContextManager:
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _stats_kind(stats: LayerStats | None) -> int:
    if stats is None:
        return _stats.NO_STATS
    return _stats.WITH_MOMENTS if stats.with_moments else _stats.EXTREMA
