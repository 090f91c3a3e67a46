"""Stage 3, fusion: every task's core goes in as it is, all else is blended tensor by tensor.

    theta[j] = theta_i[j]                                          for j in C_i
    theta[j] = a r[j] + b theta_i[j], r <- theta, task by task     elsewhere
    a, b     = 1 - omega, omega                                    linear, and SLERP where Omega < eps
             = sin((1 - omega) Omega) / sin Omega, sin(omega Omega) / sin Omega      SLERP

r begins as the base, "the model parameters derived from the last multi-stage fine-tuning group". Omega is the angle
between the whole tensors r and theta_i ("parameters are first normalized to unit vectors": for the angle; what is
blended are the tensors as they are), before any core is put in. Where the cores of two tasks overlap, the later
task's values stay.

Blended linearly besides: a tensor of zeros, which has no direction, and tensors that point opposite ways (within
max(eps, 1e-6) of pi), for which no plane is given and sin Omega vanishes.

The paper prints neither omega nor eps. omega=None gives every fold 1 / (i + 1), i = 1, 2, ...: base and tasks then
weigh the same (blended linearly: the mean, in any order). eps is the angle whose cosine is 0.9995, the bound of the
SLERP in mergekit (Goddard et al., 2024), by which the paper's is "inspired".

What is computed: r is always a sum of the tensors with one coefficient each, so a pass over a tensor collects the
scalar products of all of them (float64), the coefficients follow, and a second pass adds up in float32 (float64
tensors: in float64) and rounds to the base's dtype. A core's values are copied, bit for bit where the dtypes agree.
Memory: a slice of each tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint_writer import write_checkpoint
from .checkpoints import (
    Checkpoint,
    MemoryTensors,
    Source,
    Tensors,
    floating,
    open_tensors,
    read,
    require_same_architecture,
    require_same_shapes,
    slices,
)
from .core_file import Core, CoreSource, open_core, read_mask
from .errors import IsolationError
from .tensor_files import FLOATS

METHODS = ("slerp", "linear")
EPS = math.acos(0.9995)  # radians
OPPOSITE = 1e-6  # radians
MAX_SHARD_BYTES = 5_000_000_000
NOTES = "fusion.json"


@dataclass
class FusionReport:
    """What a fusion did. `angles`: for SLERP, by tensor, one a task, radians; nan where a tensor is zero."""

    slerp: int = 0  # folds (tensors x tasks) that were blended on the sphere
    linear: int = 0
    core_elements: int = 0  # elements with a core's values
    elements: int = 0
    angles: dict[str, list[float]] = field(default_factory=dict)


def angle(dot: float, norm: float, other: float) -> float:
    """Radians between two vectors of these norms; nan when one is zero."""
    if norm == 0 or other == 0:
        return math.nan
    return math.acos(max(-1.0, min(1.0, dot / (norm * other))))


def fold(omega: float, theta: float, eps: float) -> tuple[float, float, bool]:
    """(a, b, on the sphere) of one fold at the angle `theta`, radians."""
    spherical = theta >= eps and theta > 0 and math.pi - theta >= max(eps, OPPOSITE)  # False for nan
    if not spherical:
        return 1 - omega, omega, False
    return math.sin((1 - omega) * theta) / math.sin(theta), math.sin(omega * theta) / math.sin(theta), True


def coefficients(
    gram: Sequence[Sequence[float]] | None, tasks: int, omega: float | None, eps: float
) -> tuple[list[float], list[float], int]:
    """Coefficients of base and tasks, angles of the folds, and how many of them were on the sphere.

    `gram`: scalar products of base and tasks, [tasks + 1, tasks + 1]; None: every fold is linear.
    """
    total, angles, spherical = [1.0], [], 0
    for i in range(1, tasks + 1):
        weight = 1 / (i + 1) if omega is None else omega
        theta = math.nan
        if gram is not None:
            dot = sum(c * gram[j][i] for j, c in enumerate(total))
            square = sum(c * d * gram[j][k] for j, c in enumerate(total) for k, d in enumerate(total))
            theta = angle(dot, math.sqrt(max(0.0, square)), math.sqrt(gram[i][i]))
            angles.append(theta)
        a, b, on_sphere = fold(weight, theta, eps)
        total = [a * c for c in total] + [b]
        spherical += on_sphere
    return total, angles, spherical


class _Fusion:
    """Base, tasks and cores that fit together, and the recipe."""

    def __init__(
        self,
        base: Tensors,
        tuned: Sequence[Tensors],
        cores: Sequence[Core],
        method: str,
        omega: float | None,
        eps: float,
        advance: Callable[[int], None] | None,
    ):
        if method not in METHODS:
            raise IsolationError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
        if omega is not None and not 0 <= omega <= 1:
            raise IsolationError(f"omega is {omega!r}; allowed: 0 to 1, or None for equal shares")
        if not 0 <= eps < math.pi:
            raise IsolationError(f"eps is {eps!r}; allowed: 0 or more and less than pi (radians)")
        if not tuned:
            raise IsolationError("a fusion needs at least one tuned checkpoint beside the base")
        if cores and len(cores) != len(tuned):
            raise IsolationError(
                f"{len(tuned)} tuned checkpoints need {len(tuned)} cores (or none), got {len(cores)}"
            )
        require_same_architecture(base, tuned)
        shapes = {name: info.shape for name, info in floating(base).items()}
        for core in cores:
            require_same_shapes(core.label, core.shapes, shapes, base.label)
        self.base, self.tuned, self.cores = base, tuned, cores
        self.method, self.omega, self.eps = method, omega, eps
        self.report = FusionReport(elements=sum(map(math.prod, shapes.values())))
        self._advance = advance or (lambda elements: None)
        self._require_equal_integers()

    @property
    def passes(self) -> int:
        return 2 if self.method == "slerp" else 1

    def _require_equal_integers(self) -> None:
        for name, info in self.base.tensors.items():
            for begin, end in () if info.floating else slices(info.n_bytes):
                for task in self.tuned:
                    if not torch.equal(
                        self.base.read_bytes(name, begin, end), task.read_bytes(name, begin, end)
                    ):
                        raise IsolationError(
                            f"{task.label}: {name} ({info.dtype}) differs from {self.base.label}'s; only floating-point "
                            "tensors can be blended"
                        )

    def produce(self, name: str) -> Iterator[Tensor]:
        """One tensor of the fused model, flat, slice by slice."""
        info = self.base.tensors[name]
        if not info.floating:
            for begin, end in slices(info.n_bytes):
                yield self.base.read_bytes(name, begin, end)
            return
        sources = (self.base, *self.tuned)
        dtypes = {FLOATS[source.tensors[name].dtype] for source in sources}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        gram = self._gram(name, info.numel) if self.method == "slerp" else None
        weights, angles, spherical = coefficients(gram, len(self.tuned), self.omega, self.eps)
        self.report.slerp += spherical
        self.report.linear += len(self.tuned) - spherical
        if gram is not None:
            self.report.angles[name] = angles
        for start, stop in slices(info.numel):
            own = [read(source, name, start, stop) for source in sources]
            total = own[0].to(wide) * weights[0]
            for weight, values in zip(weights[1:], own[1:], strict=True):
                total += values.to(wide) * weight
            fused = total.to(own[0].dtype)
            taken = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
            for core, values in zip(self.cores, own[1:]):
                mask = read_mask(core, name, start, stop)
                fused = torch.where(mask, values.to(fused.dtype), fused)
                taken |= mask
            if not bool(torch.isfinite(fused).all()):
                raise IsolationError(f"{name}: the fused tensor is not finite; are the checkpoints?")
            self.report.core_elements += int(taken.sum())
            self._advance(stop - start)
            yield fused

    def _gram(self, name: str, numel: int) -> list[list[float]]:
        sources = (self.base, *self.tuned)
        gram = torch.zeros(len(sources), len(sources), dtype=torch.float64, device="cpu")
        for start, stop in slices(numel):
            rows = torch.stack([read(source, name, start, stop).double() for source in sources])
            gram += rows @ rows.T
            self._advance(stop - start)
        if not bool(torch.isfinite(gram).all()):
            worst = int((~torch.isfinite(gram.diagonal())).int().argmax())
            raise IsolationError(f"{sources[worst].label}: {name} is not finite")
        return gram.tolist()


def fuse(
    base: Source,
    tuned: Sequence[Source],
    cores: Sequence[CoreSource] = (),
    *,
    method: str = "slerp",
    omega: float | None = None,
    eps: float = EPS,
) -> tuple[dict[str, Tensor], FusionReport]:
    """The fused tensors in memory, for models that fit; the module's docstring has the formulas.

    `cores`: one for each of `tuned`, in the same order; none at all: everything is blended.

    Raises:
        IsolationError (a ValueError): another architecture, cores of another model, integer tensors that differ,
            values that are not finite, arguments outside their ranges.
    """
    first = open_tensors(base)
    fusion = _Fusion(
        first,
        [open_tensors(one) for one in tuned],
        [open_core(one) for one in cores],
        method,
        omega,
        eps,
        None,
    )
    fused = {}
    for name, info in first.tensors.items():
        pieces = list(fusion.produce(name))
        if info.floating:
            flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=FLOATS[info.dtype], device="cpu")
            fused[name] = flat.view(info.shape)
        elif isinstance(base, dict):
            fused[name] = base[name].clone()
        else:
            raise IsolationError(f"{name} is {info.dtype}: fuse such checkpoints with fuse_checkpoints")
    if isinstance(first, MemoryTensors):  # tied tensors stay one, under all their names
        fused |= {name: fused[of] for name, of in first.aliases.items()}
    return fused, fusion.report


def fuse_checkpoints(
    base: str | os.PathLike[str],
    tuned: Sequence[str | os.PathLike[str]],
    cores: Sequence[CoreSource],
    out: str | os.PathLike[str],
    *,
    method: str = "slerp",
    omega: float | None = None,
    eps: float = EPS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> FusionReport:
    """The same from checkpoint directories to a new one, whole or not at all, in the base's dtype.

    The base's config and tokenizer are copied; `fusion.json` says what was fused. `advance` is called with numbers
    of elements: D of them a pass, two passes for SLERP.

    Raises:
        IsolationError (a ValueError): as `fuse`, or `out` holds something.
        DiskFull: no room; nothing is left at `out`.
    """
    if max_shard_bytes < 1:
        raise IsolationError(f"max_shard_bytes is {max_shard_bytes}; allowed: 1 or more")
    first, tasks = Checkpoint(base), [Checkpoint(one) for one in tuned]
    opened = [open_core(one) for one in cores]
    fusion = _Fusion(first, tasks, opened, method, omega, eps, advance)
    notes = {
        "base": first.label,
        "tuned": [task.label for task in tasks],
        "cores": [core.label for core in opened],
        "method": method,
        "omega": omega,
        "eps": eps if method == "slerp" else None,
    }
    write_checkpoint(Path(out), first, fusion.produce, max_shard_bytes, notes, NOTES)
    return fusion.report
