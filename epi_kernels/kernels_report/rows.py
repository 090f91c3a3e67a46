"""A row of the table, what `--check` demands of it, and how the table is printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from epi_kernels.kernels_report.sass import Kernel, common_path, widths
from epi_kernels.text import columns

# What an H200 has time for while it moves the 28 bytes of a float32 element is about 200.
MAX_INSTRUCTIONS = 100
# Where a state is 8-bit. On sm_90 bfloat16 weights and states take 87; codes instead of bfloat16 add 26, an importance
# of codes of its own 22 more, zscore's float64 sums 21.
MAX_INSTRUCTIONS_INT8 = 140
# Where states have 4 bits: 165 and 170 on sm_90, 188 and 194 with stats. That is more than an H200 has time for while it
# moves their 9.3 bytes.
MAX_INSTRUCTIONS_INT4 = 210
MAX_INSTRUCTIONS_BF16 = 110  # sm_90 has 73 to 104 with bfloat16 states
MAX_INSTRUCTIONS_CORRECTION = 10  # what weights with a correction beside them may add to it
FULL_WIDTH = 128  # bits
MASK_WIDTH = 8  # a packed mask is read byte by byte; nothing else here has an element of 8 bits


@dataclass(frozen=True)
class Expectation:
    """What the check knows of a kernel beforehand."""

    elements: float  # elements a thread handles in a block; 0: no loop over elements
    loads: float = 0  # accesses of FULL_WIDTH bits a thread makes in a block, or their worth in narrower ones
    stores: float = 0
    full_width: bool = False  # the full-chunk path of a step kernel: none may be narrower
    max_instructions: int = 0  # an element; 0: not limited


@dataclass(frozen=True)
class Row:
    source: str  # "triton" | "cuda"
    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions_per_element: float | None  # None: no loop over elements, or the count is not known
    common_instructions_per_element: float | None  # of them, without the slow cases of a division or root
    loads: dict[int, int]  # of the hot loop: width in bits -> how many
    stores: dict[int, int]
    problems: tuple[str, ...]

    def as_json(self) -> dict:
        return asdict(self)


def make_row(source: str, name: str, arch: str, kernel: Kernel, expected: Expectation | None) -> Row:
    loop = kernel.hot_loop
    loads, stores = dict(widths(loop, "LDG", "LD")), dict(widths(loop, "STG", "ST"))
    per_element = common = None
    problems = [f"spills {kernel.spill_bytes} bytes"] if kernel.spill_bytes else []
    if expected is not None:
        blocks = _unrolled(loads, expected)
        if expected.elements and blocks:
            per_element = len(loop) / (expected.elements * blocks)
            common = len(common_path(loop)) / (expected.elements * blocks)
        if expected.full_width:
            problems += _width_problems("load", loads, expected.loads * (blocks or 1))
            problems += _width_problems("store", stores, expected.stores * (blocks or 1))
        limit = expected.max_instructions
        if limit and per_element is None:
            problems.append("no loop over elements was found")
        elif limit and per_element is not None and per_element > limit:
            problems.append(f"{per_element:.0f} instructions an element, more than {limit}")
    return Row(
        source,
        name,
        arch,
        kernel.registers,
        kernel.spill_bytes,
        kernel.shared_bytes,
        per_element,
        common,
        loads,
        stores,
        tuple(problems),
    )


def _unrolled(loads: dict[int, int], expected: Expectation) -> int:
    """How many blocks a turn of the loop handles: what it loads over what a block needs."""
    if not expected.loads:
        return 0
    return int(sum(n * w for w, n in loads.items() if w != MASK_WIDTH) // (expected.loads * FULL_WIDTH))


def _width_problems(what: str, found: dict[int, int], wanted: float) -> Iterable[str]:
    narrow = {w: n for w, n in found.items() if w < FULL_WIDTH and w != MASK_WIDTH}
    if narrow:
        yield f"narrow {what}s: {describe(narrow)}"
    wide = sum(n * w // FULL_WIDTH for w, n in found.items() if w >= FULL_WIDTH)
    if wide != wanted:
        yield f"{wide} {what}s of {FULL_WIDTH} bits, {wanted:g} expected"


def describe(accesses: dict[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(accesses.items(), reverse=True)) or "-"


def table(rows: Iterable[Row]) -> str:
    header = ("kernel", "arch", "regs", "spill B", "shared B", "instr/elem", "loads", "stores", "")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        per_element = row.instructions_per_element
        lines.append(
            (
                row.kernel,
                row.arch,
                str(row.registers),
                str(row.spill_bytes),
                str(row.shared_bytes),
                "-" if per_element is None else f"{per_element:.1f}",
                describe(row.loads),
                describe(row.stores),
                "; ".join(row.problems),
            )
        )
    return columns(lines, left={0, 1, 6, 7, 8})
