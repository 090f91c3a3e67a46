"""Arguments and output of `epi-kernels kernels`."""

from __future__ import annotations

import argparse
import json
import sys

ARCHITECTURES = (80, 90, 100, 120)
KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)  # all that both compilers' ptxas take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        action="append",
        type=_arch,
        metavar="SM",
        help="an architecture, 90 or sm_90; repeatable (80, 90, 100, 120)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 on a spill, a step access narrower than 128 bits, or a step of more than 100 "
        "instructions an element with float32 states, 110 with bfloat16 ones, 135 with 8-bit ones, 10 more where weights "
        "have a correction",
    )
    parser.add_argument("--cuda", action="store_true", help="the CUDA sources instead, compiled by nvcc")
    parser.add_argument(
        "--cost-of-exactness",
        action="store_true",
        help="instructions an element of the low-bit steps as shipped, and with one exactness after another given up, "
        "as Markdown (sm_90)",
    )
    parser.add_argument(
        "--jobs", type=_jobs, metavar="N", help="processes that compile (one a core, 8 at most)"
    )


def _arch(text: str) -> int:
    digits = text.removeprefix("sm_")
    if not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture such as sm_90")
    if int(digits) not in KNOWN:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, KNOWN))}")
    return int(digits)


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from epi_kernels.kernels_report import cuda_kernels
    from epi_kernels.kernels_report.rows import table

    if args.cost_of_exactness:
        return _cost_of_exactness(args)
    archs = tuple(args.arch or ARCHITECTURES)
    if args.cuda:
        try:
            rows = cuda_kernels.rows(archs)
        except RuntimeError as error:
            raise SystemExit(f"epi-kernels kernels --cuda: {error}") from error
    else:
        from epi_kernels.kernels_report import triton_kernels

        rows = triton_kernels.rows(archs, args.jobs)
    bad = [row for row in rows if row.problems]
    if args.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    else:
        print(table(rows))
        print("\nInstructions, loads and stores (how many x bits) are those of the loop over full blocks,")
        print("rare slow paths inside it included; loads of 8 bits are the packed masks.")
    if args.check:
        for row in bad:
            print(f"FAILED {row.kernel} {row.arch}: {'; '.join(row.problems)}", file=sys.stderr)
        if args.cuda:
            # Without names (no demangler, a kernel renamed) no expectation is known and nothing was checked.
            blind = [arch for arch in archs if not cuda_kernels.steps_recognised(rows, arch)]
            for arch in blind:
                print(f"FAILED sm_{arch}: no step kernel was recognised (is c++filt there?)", file=sys.stderr)
            bad += blind
        if bad:
            return 1
        print(f"check: {len(rows)} kernels pass", file=sys.stderr)
    return 0


def _cost_of_exactness(args: argparse.Namespace) -> int:
    for option in ("cuda", "check"):
        if getattr(args, option):
            raise SystemExit(f"epi-kernels kernels: --cost-of-exactness goes without --{option}")
    from epi_kernels.kernels_report import exactness

    rows = [row.as_json() for row in exactness.costs(args.arch or (90,), args.jobs)]
    print(json.dumps(rows, indent=1) if args.json else exactness.markdown(rows))
    return 0
