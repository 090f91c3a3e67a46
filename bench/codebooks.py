"""make codebooks: what an 8-bit code of second moments costs an EMA, one code book beside another.

python -m bench.codebooks       minutes on two cores; writes bench/results/codebooks-DATE-COMMIT.json

A book is the values that 255 codes (or fewer) stand for, times the scale of a block of 64. Every step decodes, adds
the squared gradient and codes again, rounding to one of two neighbours so that the value is right in the mean; what lies
below the smallest becomes that. Simulated in float64 with torch.bucketize: the books that are not shipped have no kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import results
from bench.markdown import count
from epi_kernels.markdown import table
from epi_kernels.reference import codec

PREFIX = "codebooks"
SHIPPED = "15 binades of 16, 6 of 2 below (shipped)"


@dataclass(frozen=True)
class Plan:
    blocks: int = 512
    steps: int = 2000
    beta: float = 0.999
    ratios: tuple[float, ...] = (1e-1, 1e-2, 1e-3)  # of the gradients beside an element of gradient 1
    spread: float = 1.0  # of the logarithms of gradient sizes, where masks are compared
    outlier: float = 300.0  # times larger, one element in every tenth block
    outliers: tuple[float, ...] = (300.0, 3000.0, 20000.0)  # one in every block, where steps are compared
    warmup: int = 500  # steps before steps are compared
    shares: tuple[float, ...] = (0.01, 0.1)  # p
    seed: int = 0


def floats(
    exponent_bits: int, mantissa_bits: int, *, subnormals: bool = False, below: int = 0, each: int = 1
) -> Tensor:
    """Positive values of a small float, the largest below 2; the lowest binade's codes stand for nothing, for
    ``subnormals``, or for so many binades ``below``, of ``each`` codes."""
    steps = 1 << mantissa_bits
    mantissas = 1 + torch.arange(steps, dtype=torch.float64) / steps
    binades = 1 << exponent_bits
    lowest = 2.0 ** (1 - binades + 1)
    values = [2.0 ** (e - binades + 1) * mantissas for e in range(1, binades)]
    if subnormals:
        values.append(lowest * torch.arange(1, steps, dtype=torch.float64) / steps)
    coarse = 1 + torch.arange(each, dtype=torch.float64) / each
    values += [lowest * 2.0**-k * coarse for k in range(1, below + 1)]
    return torch.cat(values).sort().values


BOOKS: dict[str, Tensor] = {
    SHIPPED: floats(4, 4, below=6, each=2),
    "15 binades of 16, 7 of 2 below": floats(4, 4, below=7, each=2),
    "15 binades of 16, 15 of 1 below": floats(4, 4, below=15),
    "15 binades of 16, subnormals": floats(4, 4, subnormals=True),
    "4 exponent, 4 mantissa bits": floats(4, 4),
    "5 exponent, 3 mantissa bits": floats(5, 3),
    "3 exponent, 5 mantissa bits": floats(3, 5),
    "linear": torch.arange(1, 256, dtype=torch.float64) / 256,
}


class Coded:
    """An EMA of squares [blocks, 64] in codes of a book; float64 without one."""

    def __init__(self, book: Tensor | None, plan: Plan, blocks: int) -> None:
        self._book, self._beta = book, plan.beta
        self._generator = torch.Generator().manual_seed(plan.seed + 1)
        self.value = torch.zeros(blocks, codec.BLOCK, dtype=torch.float64)

    def add(self, squares: Tensor) -> None:
        self.value = self._beta * self.value + (1 - self._beta) * squares
        if self._book is not None:
            self.value = self._rounded(self.value, self._book)

    def _rounded(self, x: Tensor, book: Tensor) -> Tensor:
        top = x.amax(1, keepdim=True).clamp_min(1e-300)
        scale = torch.exp2(torch.ceil(torch.log2(top / book[-1])))
        y = (x / scale).clamp(min=float(book[0]), max=float(book[-1]))
        above = torch.bucketize(y, book).clamp(1, len(book) - 1)
        low, high = book[above - 1], book[above]
        up = torch.rand(y.shape, generator=self._generator, dtype=torch.float64) < (y - low) / (high - low)
        return torch.where(x > 0, torch.where(up, high, low) * scale, 0.0)


def _trained(book: Tensor | None, plan: Plan, size: Tensor) -> Tensor:
    """The EMA after random gradients of these sizes, the same for every book."""
    generator = torch.Generator().manual_seed(plan.seed)
    coded = Coded(book, plan, plan.blocks)
    for _ in range(plan.steps):
        coded.add((size * torch.randn(size.shape, generator=generator, dtype=torch.float64)).square())
    return coded.value


def _sizes(plan: Plan, outlier: float) -> Tensor:
    generator = torch.Generator().manual_seed(plan.seed + 2)
    shape = (plan.blocks, codec.BLOCK)
    size = torch.exp(plan.spread * torch.randn(shape, generator=generator, dtype=torch.float64))
    size[::10, 0] *= outlier
    return size


def _mask(u: Tensor, share: float) -> Tensor:
    flat = u.flatten()
    return flat >= flat.kthvalue(flat.numel() - int(share * flat.numel()) + 1).values


def _jaccard(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def _largest_step(book: Tensor | None, plan: Plan, outlier: float) -> float:
    """The largest |exp_avg| / root of exp_avg_sq beside an outlier in each block; first moments as shipped, or exact."""
    generator = torch.Generator().manual_seed(plan.seed)
    rounding = torch.Generator().manual_seed(plan.seed + 3)
    size = torch.ones(plan.blocks // 8, codec.BLOCK, dtype=torch.float64)
    size[:, 0] = outlier
    squares, average, largest = Coded(book, plan, size.shape[0]), torch.zeros_like(size), 0.0
    for step in range(plan.warmup + plan.steps // 2):
        gradient = size * torch.randn(size.shape, generator=generator, dtype=torch.float64)
        squares.add(gradient.square())
        average = 0.9 * average + 0.1 * gradient
        if step >= plan.warmup:
            largest = max(largest, float((average / squares.value.sqrt())[:, 1:].abs().max()))
        if book is not None:
            random = torch.randint(1 << 16, (average.numel(),), generator=rounding)
            codes = codec.encode(average.float().flatten(), random, signed=True)
            average = codec.decode(*codes, signed=True).double().view_as(average)
    return largest


def measure(book: Tensor, plan: Plan, exact: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """``exact``: the EMA in float64 of gradients of these sizes."""
    even = torch.ones(plan.blocks, codec.BLOCK, dtype=torch.float64)
    found: dict[str, Any] = {"codes": len(book), "range": float(book[-1] / book[0])}
    found["noise"] = float((_trained(book, plan, even) / exact(even)).std())
    steps = []
    for ratio in plan.ratios:
        size = even.clone()
        size[:, 1::2] = ratio
        steps.append(float((exact(size) / _trained(book, plan, size))[:, 1::2].sqrt().mean()))
    found["steps"] = steps
    found["largest_steps"] = [
        _largest_step(book, plan, outlier) / _largest_step(None, plan, outlier) for outlier in plan.outliers
    ]
    for name, outlier in (("jaccard", 1.0), ("jaccard_outliers", plan.outlier)):
        size = _sizes(plan, outlier)
        coded, true = _trained(book, plan, size), exact(size)
        found[name] = [_jaccard(_mask(coded, share), _mask(true, share)) for share in plan.shares]
        found[name + "_isolated"] = [
            float(_mask(coded, share).double().mean() / _mask(true, share).double().mean())
            for share in plan.shares
        ]
    return found


def record(plan: Plan = Plan()) -> dict[str, Any]:
    known: list[tuple[Tensor, Tensor]] = []

    def exact(size: Tensor) -> Tensor:
        for one, value in known:
            if torch.equal(one, size):
                return value
        known.append((size, _trained(None, plan, size)))
        return known[-1][1]

    books = tqdm(BOOKS.items(), unit="book", disable=None)
    rows = [{"book": name, **measure(book, plan, exact)} for name, book in books]
    return results.provenance() | {"plan": asdict(plan), "rows": rows}


def text(folder: Path = results.RESULTS) -> str:
    """The README's block."""
    found = results.newest_record(folder, PREFIX)
    if found is None:
        return "Not measured yet: `make codebooks`."
    plan, lines = found["plan"], []
    for row in found["rows"]:
        line = [row["book"], str(row["codes"]), f"{row['range']:.2g}", f"{row['noise']:.3f}"]
        line.append(" / ".join(f"{step:.2g}" for step in row["steps"]))
        line.append(" / ".join(f"{step:.2g}" for step in row["largest_steps"]))
        for name in ("jaccard", "jaccard_outliers"):
            line.append(" / ".join(f"{value:.2f}" for value in row[name]))
        line.append(" / ".join(f"{value:.2f}" for value in row["jaccard_outliers_isolated"]))
        lines.append(line)
    ratios = ", ".join(f"{ratio:g}" for ratio in plan["ratios"])
    outliers = ", ".join(f"{outlier:g}" for outlier in plan["outliers"])
    shares = ", ".join(f"{100 * share:g} %" for share in plan["shares"])
    header = [
        "code book",
        "codes",
        "range",
        "noise",
        "steps",
        "largest steps",
        "masks",
        "masks, outliers",
        "isolated, outliers",
    ]
    caption = (
        f"{count(plan['blocks'] * codec.BLOCK)} second moments, {count(plan['steps'])} steps, beta {plan['beta']}, simulated, commit "
        f"{found['commit']}"
        + (" with uncommitted changes" if found["dirty"] else "")
        + ". Noise: standard deviation of a "
        f"coded moment over the exact one. Steps: how far elements move whose gradients are {ratios} of their neighbours', over "
        f"an exact step. Largest steps: of elements beside one whose gradients are {outliers} times larger, first moments coded "
        f"too, over the largest exact step. Masks: Jaccard with the exact mask at p = {shares}, sizes of gradients lognormal; outliers: one element "
        f"in every tenth block has gradients {plan['outlier']:g} times larger. Isolated: over what the exact mask isolates."
    )
    return caption + "\n\n" + table(header, lines, "lrrrrrrrr")


def main() -> int:
    results.record_rows(record(), PREFIX)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
