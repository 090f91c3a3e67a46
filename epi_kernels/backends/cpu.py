"""The stages in C++ (csrc/cpu): threaded, AVX-512, AVX2 or plain, chosen at run time."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.backends.batch import StepBatch
from epi_kernels.backends.operators import cpu_operators
from epi_kernels.backends.table import RNG_KEY, fill_layers, refresh_table
from epi_kernels.reference.scalars import reciprocal_scale
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch, SearchProblem

ISA_VARIABLE = "EPI_KERNELS_CPU_ISA"  # avx512 | avx2 | plain; unset: the widest there is

# From here on a sample that brackets the threshold costs less than it saves.
SAMPLE_FROM_ELEMENTS = 1 << 15


class CpuBackend:
    """Gives the bits of the reference; float64 moments (zscore) may differ in the last place."""

    name = "cpu"
    counts_on_device = False
    captures = False
    places_runs = True

    def __init__(self, isa: str | None = None) -> None:
        """
        Raises:
            ImportError: the extension is not built, or this processor lacks the instruction set
                asked for (``isa``, else the variable ``EPI_KERNELS_CPU_ISA``).
        """
        try:
            self._ops = cpu_operators()
        except ImportError as error:
            raise ImportError(
                f"the C++ extension epi_kernels._C cannot be imported ({error}); build it with "
                "`pip install --no-build-isolation -e .` in the source tree"
            ) from error
        requested = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
        try:
            self._isa = self._ops.cpu_isa(requested)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ImportError(f"{ISA_VARIABLE}={requested!r}: {reason}") from error
        self.isa = requested or self._ops.cpu_capability()
        self.description = f"C++, {self.isa}"

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on CPU parameters, not on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"has float32 and bfloat16 paths, not {dtype}"
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
        if found_inf is not None and bool(found_inf):
            return
        t = batch.counts.next()
        table = batch.table(writes_grad=grad_scale is not None)
        if stochastic_rounding and batch.any_low_precision:
            table.rows[:, RNG_KEY] = batch.rng_keys(seed, t)
        if stats is not None:
            fill_layers(table, batch.tensors)
        self._ops.cpu_step(
            torch.from_numpy(table.rows),
            torch.from_numpy(batch.scalars(t)),
            stochastic_rounding,
            None if grad_scale is None else reciprocal_scale(float(grad_scale)),
            None if stats is None else stats.minimum,
            None if stats is None else stats.maximum,
            None if stats is None else stats.nonfinite,
            None if stats is None else stats.moments,
            stats is not None and stats.with_moments,
            self._isa,
        )
        table.finish()
        batch.counts.advance()

    def accumulate(self, tensors: Sequence[ParamTensors], stats: LayerStats) -> None:
        table = refresh_table(tensors)
        self._ops.cpu_accumulate(
            torch.from_numpy(table.rows),
            stats.minimum,
            stats.maximum,
            stats.nonfinite,
            stats.moments,
            stats.with_moments,
            self._isa,
        )

    def count(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        search: KthSearch,
        sample_stride: int = 1,
    ) -> None:
        table = refresh_table(tensors)
        self._ops.cpu_count(
            torch.from_numpy(table.rows),
            terms.shift,
            terms.scale,
            search.keep_factor,
            search.lo,
            search.hi,
            search.shift,
            search.done,
            search.domain,
            search.histogram,
            sample_stride,
            self._isa,
        )

    def find_thresholds(
        self, tensors: Sequence[ParamTensors], terms: ScoreTerms, problem: SearchProblem
    ) -> tuple[Tensor, Tensor]:
        """The whole threshold stage; every element with state is in ``tensors``."""
        table = refresh_table(tensors)
        threshold = torch.empty(len(problem.k), dtype=torch.float32, device="cpu")
        count_ge = torch.empty_like(problem.k)
        self._ops.cpu_find_thresholds(
            torch.from_numpy(table.rows),
            terms.shift,
            terms.scale,
            problem.keep_factor,
            problem.domain,
            problem.zeros,
            problem.n_elements,
            problem.k,
            problem.floor,
            problem.end,
            1 << problem.bin_bits,
            SAMPLE_FROM_ELEMENTS,
            threshold,
            count_ge,
            self._isa,
        )
        return threshold, count_ge

    def select(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        thresholds: Tensor,  # [layers] fp32
        keep_factor: float,
        drift: Tensor,  # [layers, 3] int64
    ) -> None:
        table = refresh_table(tensors)
        self._ops.cpu_select(
            torch.from_numpy(table.rows),
            terms.shift,
            terms.scale,
            keep_factor,
            terms.positive_only,
            thresholds.contiguous(),
            drift,
            self._isa,
        )
