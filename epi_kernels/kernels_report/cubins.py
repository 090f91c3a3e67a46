"""Many cubins of one kernel each, disassembled in one call: a call takes 0.3 s of CPU however small the kernel is."""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from epi_kernels.kernels_report.sass import Instruction, Kernel, instructions_of, output_of, resources_of

# Whose last operand is the address of an instruction, which the disassembler prints from the start of the file.
_GOES_TO = {"BRA", "BSSY", "CALL", "RET", "WARPSYNC"}
_LAST_ADDRESS = re.compile(r"0x([0-9a-f]+)$")
_HEADER = struct.Struct("<IIQQQQIIQQ")  # of a section: name, type, flags, address, offset, size, ...


def read_kernels(cubins: Sequence[bytes], arch: int, cuobjdump: str, nvdisasm: str) -> list[Kernel]:
    """The kernel of each cubin, all for ``sm_<arch>``, as ``sass.read_cubin`` reads it.

    Raises RuntimeError where a cubin does not have exactly one, or a tool fails.
    """
    codes = [_code(cubin) for cubin in cubins]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels"
        file.write_bytes(b"".join(code for _, code in codes))
        instructions = instructions_of(output_of(nvdisasm, "--binary", f"SM{arch}", str(file)))
        for cubin, (name, code) in zip(cubins, codes, strict=True):
            file.write_bytes(cubin)
            registers, shared = resources_of(output_of(cuobjdump, "-res-usage", str(file)))[name]
            kernels.append((name, len(code), registers, shared))
    found, start = [], 0
    for name, size, registers, shared in kernels:
        own = [_moved(i, start) for i in instructions if start <= i.address < start + size]
        found.append(Kernel(name, tuple(own), registers, shared))
        start += size
    return found


def _code(cubin: bytes) -> tuple[str, bytes]:
    """The name of its one kernel, and the section of its instructions."""
    kernels = [(name, code) for name, code in _sections(cubin) if name.startswith(".text.")]
    if len(kernels) != 1:
        raise RuntimeError(f"a cubin of one kernel was expected, not of {[name for name, _ in kernels]}")
    name, code = kernels[0]
    return name.removeprefix(".text."), code


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Of a 64-bit little-endian ELF file, as every cubin is."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [_HEADER.unpack_from(elf, table + size * i) for i in range(count)]
    names = headers[of_names][4]
    for header in headers:
        start = names + header[0]
        yield elf[start : elf.index(b"\0", start)].decode(), elf[header[4] : header[4] + header[5]]


def _moved(instruction: Instruction, start: int) -> Instruction:
    """As it is where its kernel begins at 0."""
    text = instruction.text
    if instruction.base in _GOES_TO:
        text = _LAST_ADDRESS.sub(lambda match: f"0x{int(match[1], 16) - start:x}", text)
    return Instruction(instruction.address - start, instruction.opcode, text)
