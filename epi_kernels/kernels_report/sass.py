"""Reads a cubin: the instructions of each kernel, its hot loop, and the width of every global access."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH = re.compile(r"^BRA\b\S*\s.*?(?:`\(\.\w+\)|(0x[0-9a-f]+))")
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDTH_SUFFIXES = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its suffixes, without a predicate
    text: str

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bits a thread moves, for a memory access."""
        suffixes = self.opcode.split(".")[1:]
        return next((_WIDTH_SUFFIXES[s] for s in suffixes if s in _WIDTH_SUFFIXES), 32)


@dataclass(frozen=True)
class Kernel:
    """One function of a cubin."""

    name: str
    instructions: tuple[Instruction, ...]
    registers: int
    shared_bytes: int

    @property
    def spill_bytes(self) -> int:
        """Bytes a thread stores to local memory. No kernel here has an array there, so these are spills."""
        return sum(i.width // 8 for i in self.instructions if i.base == "STL")

    @property
    def hot_loop(self) -> tuple[Instruction, ...]:
        """The loop that a full chunk runs: the smallest with most of the wide global accesses.

        Where a kernel has none of 128 bits, all count. Rare paths (a division's slow case) that lie
        between the loop's first and last instruction belong to it. Empty where there is no loop.
        """
        loops: list[tuple[Instruction, ...]] = [()]
        for branch in self.instructions:
            target = _BRANCH.match(_PREDICATE.sub("", branch.text))
            if target is not None and target[1] is not None and int(target[1], 16) < branch.address:
                first = int(target[1], 16)
                loops.append(tuple(i for i in self.instructions if first <= i.address <= branch.address))

        def rank(loop: tuple[Instruction, ...]) -> tuple[int, int, int]:
            accesses = widths(loop, "LDG", "LD", "STG", "ST")
            wide = sum(n for width, n in accesses.items() if width >= 128)
            return wide, 0 if wide else sum(accesses.values()), -len(loop)

        best = max(loops, key=rank)
        return best if rank(best)[:2] > (0, 0) else ()


def common_path(loop: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """The loop without its slow cases: what lies between a branch over a call and where that branch goes.

    A division or a root calls a routine where an operand is subnormal, infinite or near the ends of the
    range; every other element jumps over the call and the moves around it.
    """
    skipped: set[int] = set()
    for position, instruction in enumerate(loop):
        if instruction.base != "CALL":
            continue
        for branch in range(position - 1, -1, -1):
            found = _BRANCH.match(_PREDICATE.sub("", loop[branch].text))
            if found is not None and found[1] is not None and int(found[1], 16) > instruction.address:
                skipped.update(i.address for i in loop[branch + 1 :] if i.address < int(found[1], 16))
                break
    return tuple(i for i in loop if i.address not in skipped)


def widths(instructions: tuple[Instruction, ...], *bases: str) -> Counter[int]:
    """How many accesses of each width, in bits."""
    return Counter(i.width for i in instructions if i.base in bases)


def parse(output: str) -> list[Kernel]:
    """From the output of ``cuobjdump -sass -res-usage``."""
    usage = resources_of(output)
    pieces = _FUNCTION.split(output)[1:]
    return [
        Kernel(name, tuple(instructions_of(body)), *usage[name])
        for name, body in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def resources_of(output: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes of shared memory) of each kernel."""
    return {name: (int(reg), int(shared)) for name, reg, _, shared, _ in _RESOURCES.findall(output)}


def instructions_of(listing: str) -> list[Instruction]:
    """From what ``cuobjdump -sass`` or ``nvdisasm`` print."""
    found = []
    for address, text in _INSTRUCTION.findall(listing):
        opcode = _PREDICATE.sub("", text).split(maxsplit=1)[0]
        found.append(Instruction(int(address, 16), opcode, text))
    return found


def read_cubin(cubin: Path, cuobjdump: str) -> list[Kernel]:
    """Raises RuntimeError where the tool fails."""
    return parse(output_of(cuobjdump, "-sass", "-res-usage", str(cubin)))


def output_of(*command: str) -> str:
    """Raises RuntimeError with what the command said where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout
