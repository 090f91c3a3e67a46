"""Compiles a step as shipped, without its exact division and root, and as shipped again; prints what became of each.

A program of its own, because the tests' process has Triton's interpreter on.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import triton.language as tl

from epi_kernels.backends.triton import step
from epi_kernels.kernels_report import exactness

KERNEL, ARCH = ("bf16", "nearest"), 90  # the one that compiles soonest


def main() -> None:
    shipped, both = (
        next(form for form in exactness.FORMS if form.given_up == name)
        for name in ("", "rounded division and root")
    )
    language = (tl.div_rn, tl.sqrt_rn)
    key = step.step_kernel.cache_key
    found = [exactness.cost((*KERNEL, form, ARCH)) for form in (shipped, both, shipped)]
    with tempfile.TemporaryDirectory() as folder:
        other = exactness.rewritten(Path(str(step.__file__)), both.calls, Path(folder))
        other_key = other.step_kernel.cache_key
    facts = {
        "costs": [cost.as_json() for cost in found],
        "untouched": language == (tl.div_rn, tl.sqrt_rn) and step.step_kernel.cache_key == key,
        "keys_differ": other_key != key,
        "left_behind": [name for name in sys.modules if "approximate" in name],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
