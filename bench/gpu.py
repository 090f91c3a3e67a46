"""make gpu: every test on the device, then the first timings, into one JSON under bench/results.

Runs in slices that are not repeated: what is done is kept beside the results, for the same commit,
kernels and machine, until the run is whole; one that is begun twice and never ends is recorded as
failed. Needs torch and pytest; nothing from the network.

Exit status: 0 done, or stopped by --time-limit (the same command continues); 1 a test failed;
2 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench import gpu_timing, results
from bench.gpu_device import Device, add_arguments, device_of, versions
from bench.gpu_record import record, slug, summary, write_new
from bench.slices import Kept, Slice, run_slices
from bench.sources import kernel_hash

SCHEMA = 1
GPU_TESTS = results.ROOT / "python_tests" / "gpu"
# Seconds a slice takes at most, guessed: what --time-limit leaves must hold the next one.
TEST_SECONDS, TIMING_SECONDS, COPY_SECONDS = 240, 60, 20


# ---------------------------------------------------------------- tests


def run_pytest(arguments: list[str], timeout: float) -> dict[str, Any]:
    """Counts, failures by name, skips by reason. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        paths = [str(results.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [*command, *arguments],
            cwd=results.ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        status, output = done.returncode, done.stdout + done.stderr
        counts = read_junit(report) if report.exists() else {"run": 0, "failures": [], "skipped": {}}
    # 5: nothing was collected
    if status not in (0, 1) or (status == 1 and not counts["failures"]):
        counts["failures"].append(f"pytest ended with {status}: {output[-2000:]}")
    return {"arguments": arguments, **counts, "output_tail": output[-4000:] if counts["failures"] else ""}


def read_junit(path: Path) -> dict[str, Any]:
    run, failures, skipped = 0, [], {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if skip is not None:
            reason = skip.get("message") or "no reason"
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        run += 1
        if problem is not None:
            failures.append(
                f"{case.get('classname')}::{case.get('name')}: {problem.get('message') or ''}"[:500]
            )
    return {"run": run, "failures": failures, "skipped": skipped}


def test_slices(device: Device, backends: list[str], smoke: bool) -> list[Slice]:
    # the folder's own conftest alone: the one above it needs hypothesis
    common = ["-m", "gpu", f"--confcutdir={GPU_TESTS}", "--device", device.type]
    slices = []
    for path in sorted(GPU_TESTS.glob("test_*.py")):
        for backend in backends:
            arguments = [*common, "--backend", backend, str(path)]
            if smoke:
                arguments += ["-k", "mixed or off-by-one-mixed or two_to_the_31 or sampled"]
            name = f"tests-{path.stem.removeprefix('test_gpu_')}-{backend}"
            slices.append(Slice(name, TEST_SECONDS, lambda seconds, a=arguments: run_pytest(a, seconds)))
    return slices


def suite_slices(smoke: bool) -> list[Slice]:
    """Every test that takes its backend from the suite's own fixture; needs hypothesis."""
    if smoke or importlib.util.find_spec("hypothesis") is None:
        return []
    arguments = ["-k", "triton-cuda or cuda-cuda or reference-cuda", f"--ignore={GPU_TESTS}"]
    arguments.append(str(GPU_TESTS.parent))
    return [Slice("tests-suite", 2 * TEST_SECONDS, lambda seconds: run_pytest(arguments, seconds))]


# ---------------------------------------------------------------- slices


def timing_slices(
    device: Device, backends: list[str], smoke: bool, done: dict[str, dict[str, Any]]
) -> list[Slice]:
    effort = gpu_timing.SMOKE if smoke else gpu_timing.Effort()

    def timing(work: gpu_timing.Workload) -> dict[str, Any]:
        tests = [done[n] for n in done if n.startswith("tests-") and n.endswith(f"-{work.backend}")]
        if any("error" in result or result["failures"] for result in tests):
            return {"skipped": f"not timed: tests of {work.backend} fail"}
        try:
            return gpu_timing.measure(work, device, effort, smoke)
        finally:
            gpu_timing.release()

    slices = [Slice("copy", COPY_SECONDS, lambda _: gpu_timing.copy_gbps(device, effort))]
    timed = [backend for backend in backends if backend != "reference"]
    for work in gpu_timing.workloads(timed):
        slices.append(Slice(work.slice_name, TIMING_SECONDS, lambda _, w=work: timing(w)))
    return slices


def outcome(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    if "failures" in result:
        text = f"{result['run']} run, {len(result['failures'])} failed, {sum(result['skipped'].values())} skipped"
        return "\n    ".join([text, *result["failures"][:5]])
    if "ms" in result:
        return f"step / torch {result['step_over_torch']['p50']:.3f}, refresh / step {result['refresh_over_step']['p50']:.3f}"
    return result.get("skipped") or (f"{result['p50']} GB/s" if "p50" in result else "done")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result (bench/results/gpu-...json)")
    parser.add_argument("--only", metavar="REGEX", help="slices whose names match; the run stays incomplete")
    parser.add_argument("--commit", help="of this tree, where there is no git to ask")
    parser.add_argument("--write-now", action="store_true", help="write what is done, complete or not")
    add_arguments(parser, smoke="tiny sizes")
    args = parser.parse_args(argv)

    device = device_of(parser, args, "gpu")
    if device is None:
        return 2
    backends = ["cpu", "reference"] if device.type == "cpu" else ["triton", "cuda", "reference"]
    origin = results.provenance()
    identity = {
        "schema": SCHEMA,
        "device": device.facts(),
        "machine": origin["machine"],
        "versions": {**origin["versions"], **versions()},
        "commit": args.commit if origin["commit"] == "unknown" and args.commit else origin["commit"],
        "dirty": origin["dirty"],
        "kernel_hash": kernel_hash(),
        "date": origin["date"],
        "smoke": args.smoke,
    }
    key = f"{slug(identity['device']['name'])}-{identity['commit']}-{identity['kernel_hash']}"
    folder = results.RESULTS if args.out is None else args.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / f"gpu-{key}{'-smoke' if args.smoke else ''}.state.tmp"
    kept = Kept(state)
    done = kept.done
    slices = test_slices(device, backends, args.smoke)
    slices += timing_slices(device, backends, args.smoke, done) + suite_slices(args.smoke)
    chosen = [piece for piece in slices if args.only is None or re.search(args.only, piece.name)]
    if done:
        print(f"{len(done)} slices were done before: {state.name}")

    run_slices(chosen, kept, args.time_limit, outcome)
    run = record(identity, [piece.name for piece in slices], done)
    print("\n" + summary(run))
    if run["complete"] or args.write_now:
        print(f"written: {write_new(run, args.out)}")
        if run["complete"]:
            state.unlink(missing_ok=True)
    left = len(slices) - sum(piece.name in done for piece in slices)
    if left:
        print(f"incomplete: {left} of {len(slices)} slices are left; the same command continues")
    return 1 if run["tests"]["failed"] or any("error" in row for row in run["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
