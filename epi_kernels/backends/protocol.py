"""What a backend is: the four stages over lists of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from epi_kernels.backends.batch import StepBatch
from epi_kernels.reference.stats import LayerStats, ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch


class Backend(Protocol):
    """All tensors of one call live on one device and have dtypes that ``refuses`` lets pass.

    Calls update in place and give the bits of ``epi_kernels.reference``. Lists may hold empty tensors,
    tensors of several dtypes, and non-contiguous ``param`` and ``grad`` (states and masks are contiguous).
    A stage never reads a device value on the host.

    A backend may also have ``find_thresholds(tensors, terms, problem) -> (threshold, count_ge)``, the
    whole threshold stage where it holds every element with state (``reference.threshold.SearchProblem``).
    """

    name: str
    counts_on_device: (
        bool  # ``step`` lies on the parameters' device, and no scalar of a step is read on the host
    )

    captures: bool  # a step can be captured in a CUDA graph
    places_runs: bool  # honours ``ParamTensors.index_run``, shards that are several runs of neighbours

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take parameters of this device and dtype; None when it can."""
        ...

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
        """The masked update (``reference.step.step_``), and one more in every ``step``.

        ``grad_scale``, ``found_inf``: one-element tensors of ``torch.amp.GradScaler``; where ``found_inf`` is not 0
        nothing changes. Merges stats of the parameters with ``layer >= 0`` in the same pass when ``stats`` is given,
        from the importances as stored; not together with ``found_inf``.
        """
        ...

    def accumulate(self, tensors: Sequence[ParamTensors], stats: LayerStats) -> None:
        """Stand-alone stats (``reference.stats.accumulate``)."""
        ...

    def count(
        self, tensors: Sequence[ParamTensors], terms: ScoreTerms, search: KthSearch, sample_stride: int = 1
    ) -> None:
        """One counting pass into ``search.histogram`` (``reference.threshold.count``)."""
        ...

    def select(
        self,
        tensors: Sequence[ParamTensors],
        terms: ScoreTerms,
        thresholds: Tensor,  # [layers] fp32
        keep_factor: float,
        drift: Tensor,  # [layers, 3] int64
    ) -> None:
        """Writes the masks and adds to the drift counts (``reference.mask.select_``)."""
        ...
