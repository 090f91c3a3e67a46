"""make gpu without a GPU: its slices, its record, and the README's status line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_device, gpu_timing, shapes, sources, status

ROOT = Path(__file__).resolve().parents[1]


# --- the status line ------------------------------------------------------------------------------------------


def a_run(**changes) -> dict:
    run = {
        "device": {"type": "cuda", "name": "NVIDIA H200"},
        "date": "2030-01-02T03:04:05Z",
        "commit": "0123456789",
        "dirty": False,
        "kernel_hash": status.kernel_hash(),
        "smoke": False,
        "complete": True,
        "tests": {"run": 500, "failed": 0},
    }
    return {**run, **changes}


def write(folder: Path, *runs: dict) -> None:
    for number, run in enumerate(runs):
        (folder / f"gpu-{number}.json").write_text(json.dumps(run))


def test_never_run(tmp_path):
    assert status.line(tmp_path) == "**GPU status:** never run."


@pytest.mark.parametrize(
    "change",
    [{"smoke": True}, {"complete": False}, {"device": {"type": "cpu", "name": "cpu"}}],
    ids=["smoke", "incomplete", "cpu"],
)
def test_a_run_that_is_none_does_not_count(change, tmp_path):
    write(tmp_path, a_run(**change))
    assert status.line(tmp_path) == "**GPU status:** never run."


def test_machine_date_and_commit_of_the_newest_run(tmp_path):
    write(tmp_path, a_run(), a_run(date="2029-01-01T00:00:00Z", commit="older"))
    expected = "**GPU status:** 500 device tests passed (NVIDIA H200, 2030-01-02, commit 0123456789)."
    assert status.line(tmp_path) == expected
    write(tmp_path, a_run(dirty=True))
    assert "commit 0123456789 with uncommitted changes" in status.line(tmp_path)
    write(tmp_path, a_run(tests={"run": 500, "failed": 3}))
    assert "failing: 3 of 500 device tests" in status.line(tmp_path)


@pytest.fixture
def root(tmp_path) -> Path:
    """A source tree, and beside it the record of a run of its kernels."""
    root = tmp_path / "tree"
    for name in (
        "csrc/math/adamw.h",
        "csrc/cuda/step.cu",
        "epi_kernels/backends/triton/step.py",
        "tools/build_support.py",
        "README.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    write(tmp_path, a_run(kernel_hash=status.kernel_hash(root)))
    return root


def test_stale_once_a_kernel_file_changed(tmp_path, root):
    assert "device tests passed" in status.line(tmp_path, root)
    (root / "README.md").write_text("changed")
    assert "device tests passed" in status.line(tmp_path, root)
    (root / "csrc/cuda/step.cu").write_text("changed")
    assert status.line(tmp_path, root).startswith("**GPU status:** stale: kernels changed since")
    assert "NVIDIA H200, 2030-01-02, commit 0123456789" in status.line(tmp_path, root)


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ('"-fmad=false"', '"-fmad=true"', True),  # nvcc's
        ('"-fno-math-errno"', '"-fmath-errno"', True),  # the bindings'
        ("code=sm_{a}", "code=lto_{a}", True),
        ('"75", ', "", False),
        ('"0x020a000000000000"', '"0x20b000000000000"', True),
        ('"""What setup.py decides', '"""What it decides', False),
    ],
)
def test_stale_once_what_compiles_the_kernels_changed(tmp_path, root, old, new, stale):
    build = root / "tools/build_support.py"
    text = build.read_text()
    assert old in text
    build.write_text(text.replace(old, new))
    assert status.line(tmp_path, root).startswith("**GPU status:** stale") is stale


def test_every_kernel_pattern_matches_a_file():
    assert all(list(ROOT.glob(pattern)) for patterns in sources.KERNEL_FILES.values() for pattern in patterns)


def test_check_of_a_readme(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n**GPU status:** never run.\n")
    arguments = ["--check", str(readme), "--results", str(tmp_path)]
    assert status.main(arguments) == 0
    write(tmp_path, a_run())
    assert status.main(arguments) == 1
    assert "another GPU status line" in capsys.readouterr().err


# --- the runner -----------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])


def test_failed_tests_of_a_backend_leave_it_untimed():
    done = {"tests-stages-cpu": {"failures": ["broken"], "run": 1, "skipped": {}}}
    slices = gpu.timing_slices(gpu_device.CpuDevice(), ["cpu", "reference"], True, done)
    timed = {piece.name: piece for piece in slices}
    assert "tests of cpu fail" in timed["time-llama-1b-f32-cpu"].run(1.0)["skipped"]


def test_junit_counts(tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no')\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip(reason='why not')\n"
        "def test_skipped(): pass\n"
    )
    (tmp_path / "none.ini").write_text("[pytest]\n")
    result = gpu.run_pytest(["-c", str(tmp_path / "none.ini"), str(test)], 60)
    assert result["run"] == 3 and len(result["failures"]) == 2 and result["skipped"] == {"why not": 1}
    nothing = gpu.run_pytest(["-c", str(tmp_path / "none.ini"), str(tmp_path / "absent.py")], 60)
    assert nothing["failures"], "a pytest that cannot start is a failure"


def test_smoke_run_on_the_cpu(tmp_path):
    """Tests, copy and timings in two calls; the record is whole and refused as a status."""
    out = tmp_path / "gpu-smoke.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--smoke", "--out", str(out)]
    only = "tests-stages-reference|copy|time-.*-(f32|bf16(-int8|-int4)?-stochastic)-cpu"
    for extra in (["--time-limit", "0.001"], ["--write-now"]):
        done = subprocess.run([*command, "--only", only, *extra], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "incomplete:" in done.stdout
    run = json.loads(out.read_text())
    assert run["smoke"] and not run["complete"] and run["tests"]["failed"] == 0 and run["tests"]["run"] > 0
    assert len(run["rows"]) == 8 and run["kernel_hash"] == status.kernel_hash()
    for row in run["rows"]:
        assert {"p20", "p50", "p80"} <= row["ms"]["step"].keys() and row["copy_share"] > 0
        itemsize = 4 if row["dtype"] == "float32" else 2
        moved = 3 * itemsize + 2 * (row["state_bytes_per_element"] - 1 / 8) + 1 / 8
        assert row["step_gbps"] == pytest.approx(
            row["elements"] * moved / row["ms"]["step"]["p50"] / 1e6, abs=0.06
        )
        assert row["step_over_torch"]["p50"] > 0 and row["refresh_peak_above_step_bytes"] is None
    one = {row["state_dtype"]: row for row in run["rows"] if row["workload"] == "one-tensor"}
    held = {kind: row["state_bytes_per_element"] for kind, row in one.items()}
    assert 2.1 < held["int8"] < 2.3 and 1.1 < held["int4"] < 1.3, "two codes, their scales and the mask"
    assert {"torch", "triton", "nvcc", "driver"} <= run["versions"].keys()
    assert status.line(tmp_path) == "**GPU status:** never run."
    assert list(tmp_path.glob("*.state.tmp")), "an incomplete run can go on"


# --- what only a device runs ----------------------------------------------------------------------------------


def test_the_list_of_a_one_billion_llama_is_transformers():
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.for_model(**shapes.LLAMA_1B_CONFIG))
    assert [tuple(p.shape) for p in model.parameters()] == shapes.llama_1b()
    assert sum(map(math.prod, shapes.llama_1b())) == 1_235_814_400


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.at = None

    def record(self) -> None:
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_cuda_device_over_a_fake_of_torch_cuda(monkeypatch):
    class Properties:
        name, major, minor, multi_processor_count, total_memory = "Fake", 9, 0, 4, 1 << 30

    fakes = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: Properties,
        "mem_get_info": lambda device: (1 << 29, 1 << 30),
        "empty_cache": lambda: None,
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 160,
        "reset_peak_memory_stats": lambda device: None,
        "Event": FakeEvent,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)  # raises where torch has no such name
    device = gpu_device.CudaDevice()
    assert device.facts()["name"] == "Fake" and device.facts()["capability"] == "9.0"
    calls = []
    times = device.time_round([lambda: calls.append(1), lambda: calls.append(2)])
    assert times == [1.0, 1.0] and calls == [1, 2]
    assert device.peak_bytes(lambda: None) == 60 and device.free_bytes() == 1 << 29
    for name in ("set_sync_debug_mode", "_sleep", "Stream", "stream"):
        assert hasattr(torch.cuda, name)


def test_a_workload_that_does_not_fit_is_skipped_with_its_size(monkeypatch):
    device = gpu_device.CpuDevice()
    monkeypatch.setattr(device, "free_bytes", lambda: 1000)
    work = gpu_timing.Workload("llama-1b", torch.float32, "cpu")
    row = gpu_timing.measure(work, device, gpu_timing.SMOKE, smoke=False)
    assert "GiB" in row["skipped"] and row["elements"] == 1_235_814_400
