"""Stage 1: core regions, the floor(p D) largest |theta_i - theta_0| over all D parameters, counted and never sorted.

The search for the threshold is that of the optimizer's refresh (`reference.threshold`): two passes of counting over
both checkpoints, then one that writes the masks. Differences are taken in float32 (float64 tensors: in float64,
then rounded).

A weight that did not move is in no core: when fewer than floor(p D) moved, the core is all that moved. Weights that
tie at the threshold are all in it, so that the region does not depend on an order of the tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from epi_kernels.backends import dispatch
from epi_kernels.backends.protocol import Backend
from epi_kernels.files import whole
from epi_kernels.reference.bits import packed_bytes
from epi_kernels.reference.stats import ScoreTerms
from epi_kernels.reference.tensors import ParamTensors
from epi_kernels.reference.threshold import KthSearch, SearchProblem, score_keys

from .checkpoints import Source, Tensors, floating, open_tensors, read, require_same_architecture, slices
from .core_file import FORMAT, KEY, VERSION, MemoryCore
from .errors import IsolationError
from .tensor_files import TensorFileWriter, TensorInfo

BIN_BITS = 16  # 2^16 bins: the 31 bits of a positive float32 in two passes
PASSES = 3  # over both checkpoints, the writing one included
Advance = Callable[[int], None]  # told how many elements were gone through


@dataclass(frozen=True)
class CoreSummary:
    """A core region in numbers."""

    ratio: float  # p
    elements: int  # D
    k: int  # floor(p D)
    selected: int  # in the core: k and ties, or all that moved if those are fewer
    ties: int  # beyond k
    threshold: float  # of |theta_i - theta_0|; inf where nothing is selected


def find_core(base: Source, tuned: Source, ratio: float = 0.01) -> MemoryCore:
    """The core region of a task, its packed masks in memory.

    `base` and `tuned`: paths of checkpoints, or mappings of names to tensors.

    Raises:
        IsolationError (a ValueError): another architecture, a difference that is not finite, a ratio outside [0, 1).
    """
    first, second, parameters = _open(base, tuned, ratio)
    summary = _search(first, second, parameters, ratio, _silent)
    masks = {
        name: torch.cat(
            [torch.zeros(0, dtype=torch.uint8, device="cpu"), *_select(first, second, name, summary, _silent)]
        )
        for name in parameters
    }
    return MemoryCore(
        {name: info.shape for name, info in parameters.items()}, masks, f"core of {second.label}"
    )


def save_core(
    base: Source,
    tuned: Source,
    path: str | os.PathLike[str],
    ratio: float = 0.01,
    advance: Advance | None = None,
) -> CoreSummary:
    """The same, written to a file (`core_file` says what is in it), whole or not at all.

    `advance` is called with numbers of elements that add up to at most PASSES times D.

    Raises:
        IsolationError (a ValueError): as `find_core`.
        OSError: the file cannot be written; what was at `path` is still there.
    """
    advance = advance or _silent
    first, second, parameters = _open(base, tuned, ratio)
    summary = _search(first, second, parameters, ratio, advance)
    masks = []
    for name, info in parameters.items():
        size = packed_bytes(info.numel)
        masks.append((KEY + name, TensorInfo("U8", (size,), size)))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "statistic": "the largest |theta_i - theta_0|",
        **{name: repr(value) for name, value in asdict(summary).items()},
        "base": os.path.basename(os.path.normpath(first.label)),
        "tuned": os.path.basename(os.path.normpath(second.label)),
        "parameters": json.dumps({name: {"shape": list(info.shape)} for name, info in parameters.items()}),
    }
    with whole(Path(path)) as partial, TensorFileWriter(partial, masks, metadata) as writer:
        for name in parameters:
            writer.write(_select(first, second, name, summary, advance))
    return summary


def _silent(elements: int) -> None:
    pass


def _open(base: Source, tuned: Source, ratio: float) -> tuple[Tensors, Tensors, dict[str, TensorInfo]]:
    if not 0 <= ratio < 1:
        raise IsolationError(f"ratio is {ratio!r}; allowed: 0 or more and less than 1")
    first, second = open_tensors(base), open_tensors(tuned)
    require_same_architecture(first, [second])
    return first, second, floating(first)


def _distance(base: Tensors, tuned: Tensors, name: str, start: int, stop: int) -> Tensor:
    """|theta_i - theta_0|, fp32 [stop - start]."""
    before, after = read(base, name, start, stop), read(tuned, name, start, stop)
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    return (after.to(wide) - before.to(wide)).abs_().float()


def _backend() -> Backend:
    fast = dispatch.load("cpu")
    chosen = dispatch.load("reference") if isinstance(fast, str) else fast
    assert not isinstance(chosen, str), "the reference is always there"
    return chosen


def _terms() -> ScoreTerms:
    """Scores are the distances themselves."""
    zero = torch.zeros(1, dtype=torch.float32, device="cpu")
    return ScoreTerms(zero, torch.ones_like(zero), positive_only=True)


def _as_importance(distance: Tensor, mask: Tensor | None = None) -> ParamTensors:
    return ParamTensors(distance, None, distance, distance, None, mask, None)


def _search(
    base: Tensors, tuned: Tensors, parameters: dict[str, TensorInfo], ratio: float, advance: Advance
) -> CoreSummary:
    elements = sum(info.numel for info in parameters.values())
    k = math.floor(ratio * elements)
    one = torch.zeros(1, dtype=torch.int64, device="cpu")
    smallest, infinity = score_keys(
        torch.tensor([2.0**-149, torch.inf], dtype=torch.float32, device="cpu")
    ).tolist()
    search = KthSearch.start(
        SearchProblem(
            k=one + k,
            domain=one,
            n_elements=one + elements,
            zeros=one,
            floor=smallest,  # a weight that did not move is no candidate
            end=infinity,
            bin_bits=BIN_BITS,
            keep_factor=1.0,
        )
    )
    backend, terms, first = _backend(), _terms(), True
    while first or not bool(search.done):
        search.histogram.zero_()
        for name, info in parameters.items():
            for start, stop in slices(info.numel):
                distance = _distance(base, tuned, name, start, stop)
                if first and not bool(distance.max() < torch.inf):
                    raise IsolationError(f"{tuned.label}: {name} minus {base.label}'s is not finite")
                backend.count([_as_importance(distance)], terms, search)
                advance(stop - start)
        search.select()
        first = False
    selected = int(search.count_ge)
    return CoreSummary(ratio, elements, k, selected, max(0, selected - k), float(search.threshold))


def _select(
    base: Tensors, tuned: Tensors, name: str, summary: CoreSummary, advance: Advance
) -> Iterator[Tensor]:
    """The packed mask of one tensor, slice by slice."""
    backend, terms = _backend(), _terms()
    threshold = torch.tensor([summary.threshold], dtype=torch.float32, device="cpu")
    for start, stop in slices(base.tensors[name].numel):
        mask = torch.zeros(packed_bytes(stop - start), dtype=torch.uint8, device="cpu")
        drift = torch.zeros(1, 3, dtype=torch.int64, device="cpu")
        distance = _distance(base, tuned, name, start, stop)
        backend.select([_as_importance(distance, mask)], terms, threshold, 1.0, drift)
        advance(stop - start)
        yield mask
