"""Prints whether kernels read together are those that are read alone; run with Triton's compiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from epi_kernels.kernels_report import triton_kernels
from epi_kernels.kernels_report.cubins import read_kernels
from epi_kernels.kernels_report.sass import Kernel, read_cubin

ARCH = 90
NAMES = ("step f32/f32/shared", "step bf16/int8/shared", "prepare")


def main() -> None:
    entries = [entry for entry in triton_kernels.catalog() if entry.name in NAMES]
    module, compiled = triton_kernels.module_of, triton_kernels.compiled_form
    cubins = [compiled(module(entry), entry, ARCH).asm["cubin"] for entry in entries]
    cuobjdump = triton_kernels.triton_tool("cuobjdump")
    together = read_kernels(cubins, ARCH, cuobjdump, triton_kernels.triton_tool("nvdisasm"))
    alone: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        for cubin in cubins:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            alone += read_cubin(path, cuobjdump)
    sizes = [[len(kernel.instructions) for kernel in kernels] for kernels in (together, alone)]
    calls = sum(i.base == "CALL" for i in together[1].instructions)
    print(json.dumps({"together": sizes[0], "alone": sizes[1], "same": together == alone, "calls": calls}))


if __name__ == "__main__":
    main()
