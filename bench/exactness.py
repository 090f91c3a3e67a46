"""make exactness: records what `epi-kernels kernels --cost-of-exactness` counts, and makes the README's block of it.

python -m bench.exactness     writes bench/results/exactness-DATE-COMMIT.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import gpu_table, results
from epi_kernels.kernels_report.exactness import ROUNDINGS, STATES, costs, markdown
from epi_kernels.markdown import table
from epi_kernels.provenance import versions

PREFIX, ARCH = "exactness", 90
# What an H200 has time for while it moves the 10.3 bytes of a step with bfloat16 weights and 8-bit states: the aim is
# below it. Reckoned from its data sheet, not measured.
AIM, TIME_FOR, STEP_BYTES = 65, 73, 10.3
TORCH_BYTES = (14, 28)  # of a step of torch's fused AdamW, in bfloat16 and in float32


def record(jobs: int | None = None) -> dict[str, Any]:
    rows = [cost.as_json() for cost in costs((ARCH,), jobs)]
    return results.provenance() | {"versions": versions("triton", "torch"), "rows": rows}


def text(folder: Path = results.RESULTS) -> str:
    """The README's block."""
    found = results.newest_record(folder, PREFIX)
    if found is None:
        return "Not measured yet: `make exactness`."
    shipped = {(r["states"], r["rounding"]): r for r in found["rows"] if not r["given_up"]}
    each = {kernel: row["instructions_per_element"] for kernel, row in shipped.items()}
    random = {s: each[s, "stochastic"] - each[s, "nearest"] for s in STATES}
    codes = {r: each["int8", r] - each["bf16", r] for r in ROUNDINGS}
    caption = (
        f"Instructions an element of the step with bfloat16 weights, Triton {found['versions']['triton']}, "
        f"{found['date'][:10]}, commit {found['commit']}"
        + (" with uncommitted changes" if found["dirty"] else "")
        + ", in parentheses the difference from the step as shipped. Slow cases: the calls that a division and a root make "
        "of operands near the ends of float32's range; every other element jumps over them."
    )
    meeting = [
        sum(
            r["instructions_per_element"] <= AIM
            for r in found["rows"]
            if (r["states"], r["rounding"]) == kernel
        )
        for kernel in shipped
    ]
    verdict = (
        f"Stochastic rounding costs {random['int8']:.1f} with codes and {random['bf16']:.1f} with bfloat16 states, codes "
        f"{codes['stochastic']:.1f} and {codes['nearest']:.1f}. The aim is {AIM}, as an H200 has time for some {TIME_FOR} "
        f"while it moves the {STEP_BYTES} bytes (reckoned, not measured): from left to right "
        f"{', '.join(map(str, meeting))} of {len(found['rows']) // len(shipped)} meet it."
    )
    return "\n\n".join([caption, markdown(found["rows"]), verdict, _reckoned(shipped)])


def _reckoned(shipped: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """What the steps with 8-bit states may be expected to take on an H200; ``shipped``: rows by states and rounding."""
    lines = []
    for rounding in ROUNDINGS:
        executed = shipped["int8", rounding]["common_instructions_per_element"]
        times = max(executed / TIME_FOR, 1.0)  # as long as its bytes
        of_torch = (f"{times * STEP_BYTES / moved:.2f}" for moved in TORCH_BYTES)
        lines.append([rounding, f"{times:.2f}", f"{100 / times:.0f} %", *of_torch])
    _, of_bfloat16, share = gpu_table.STEPS[gpu_table.EIGHT_BIT_STEP]
    aims = (
        f"at least {100 * share:.0f} %",
        f"at most {of_bfloat16:.2f}",
        f"at most {gpu_table.OF_TORCH_FLOAT32:.2f}",
    )
    lines.append(["aim, stochastic", "-", *aims])
    header = ["8-bit states, as shipped", "time, of what its bytes take", "share of the bandwidth"]
    header += ["of torch fused, bfloat16", "of torch fused, float32"]
    return "What comes of it on an H200, reckoned likewise, slow cases left out:\n\n" + table(
        header, lines, "lrrrr"
    )


def main() -> int:
    results.record_rows(record(), PREFIX)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
