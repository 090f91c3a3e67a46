"""The build's decisions, make's plan, the command line's frame and the metadata."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import epi_kernels
from epi_kernels import cli, env
from epi_kernels.kernels_report.cuda_kernels import build_support
from python_tests.harness import need_triton, triton_has_wheels

ROOT = Path(__file__).resolve().parents[1]
support = build_support()

NVCC = support.Nvcc("/cuda/bin/nvcc", "/cuda", "13.0", ("75", "80", "86", "89", "90", "100", "120"))
OLD_NVCC = support.Nvcc("/cuda/bin/nvcc", "/cuda", "12.4", ("75", "80", "86", "89", "90"))


# ---- whether the CUDA part is built ----


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "has_sources", "environ", "build", "said"),
    [
        ("13.0", NVCC, True, {}, True, "nvcc 13.0"),
        ("13.2", NVCC, True, {}, True, "nvcc 13.0"),
        ("13.0", None, True, {}, False, "nvcc was not found"),
        ("13.0", OLD_NVCC, True, {}, False, "nvcc 12.4 is of another major version"),
        ("12.8", NVCC, True, {}, False, "nvcc 13.0 is of another major version"),
        (None, NVCC, True, {}, False, "torch it was built with has no CUDA"),
        ("13.0", NVCC, False, {}, False, "no CUDA sources"),
        ("13.0", NVCC, True, {"EPI_KERNELS_BUILD_CUDA": "0"}, False, "EPI_KERNELS_BUILD_CUDA=0"),
    ],
)
def test_choose_cuda(torch_cuda, nvcc, has_sources, environ, build, said):
    choice = support.choose_cuda(torch_cuda, nvcc, has_sources, environ)
    assert choice.build is build
    assert said in choice.reason
    assert bool(choice.archs) is build


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc"), [(None, NVCC), ("13.0", None), ("13.0", OLD_NVCC), ("12.8", NVCC)]
)
def test_cuda_that_is_demanded_and_cannot_be_built_raises(torch_cuda, nvcc):
    with pytest.raises(support.BuildError, match="EPI_KERNELS_BUILD_CUDA=1, but "):
        support.choose_cuda(torch_cuda, nvcc, True, {"EPI_KERNELS_BUILD_CUDA": "1"})


def test_unknown_build_cuda_value_is_refused():
    with pytest.raises(support.BuildError, match="expected auto, 0 or 1"):
        support.choose_cuda("13.0", NVCC, True, {"EPI_KERNELS_BUILD_CUDA": "yes"})


def test_architectures():
    assert support.choose_archs("", NVCC) == support.CUDA_ARCHS
    assert support.choose_archs("", OLD_NVCC) == ("75", "80", "86", "89", "90")
    assert support.choose_archs("80,100", NVCC) == ("80", "100")
    assert support.choose_archs("native", NVCC, lambda: ["100", "90", "90"]) == ("90", "100")
    assert support.choose_archs("native", NVCC, list) == support.CUDA_ARCHS
    with pytest.raises(support.BuildError, match="cannot compile for sm_120"):
        support.choose_archs("120", OLD_NVCC)
    with pytest.raises(support.BuildError, match="without a dot"):
        support.choose_archs("8.0", NVCC)


def test_ptx_is_kept_for_the_newest_architecture():
    flags = support.gencode_flags(("80", "120"))
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_find_nvcc_asks_a_wrapper_for_its_toolkit(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    answers = {
        "--version": "Cuda compilation tools, release 13.0, V13.0.88",
        "--dryrun": "#$ _HERE_=/opt/toolkit/bin\n#$ _SPACE_= ",
        "--list-gpu-code": "sm_75\nsm_90\nsm_90a",
    }
    found = support.find_nvcc({}, lambda _: str(nvcc), lambda command: answers[command[1]])
    assert found == support.Nvcc(str(nvcc), "/opt/toolkit", "13.0", ("75", "90"))


def test_find_nvcc_prefers_cuda_home_and_skips_what_does_not_answer(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch()

    def output(command):
        return "" if "/a/" in command[0] else "release 12.8, V12.8.1"

    environ = {"CUDA_HOME": str(tmp_path / "a"), "CUDA_PATH": str(tmp_path / "b")}
    found = support.find_nvcc(environ, lambda _: None, output)
    assert found is not None
    assert found.home == str(tmp_path / "b")


# ---- the compiler and its flags ----


def test_choose_cxx():
    def on_path(*names):
        return lambda name: f"/usr/bin/{name}" if name in names else None

    assert support.choose_cxx({"CXX": "mine"}, "g++", on_path()) == "mine"
    assert support.choose_cxx({}, "x86-g++ -pthread", on_path("x86-g++", "c++")) == "x86-g++ -pthread"
    assert support.choose_cxx({}, "absent-g++", on_path("clang++")) == "clang++"
    with pytest.raises(support.BuildError, match="apt-get install g"):
        support.choose_cxx({}, None, on_path())


def test_flags_keep_ieee_semantics():
    flags = [*support.CXX_FLAGS, *support.NVCC_FLAGS]
    assert not [flag for flag in flags if re.search(r"fast|unsafe|associative|reciprocal|-Ofast", flag)]
    assert "-ffp-contract=off" in support.CXX_FLAGS
    assert "-fmad=false" in support.NVCC_FLAGS
    assert "-ftz=false" in support.NVCC_FLAGS


def test_every_source_is_built():
    built = {*support.cpu_sources(ROOT), *support.cuda_sources(ROOT), *support.headers(ROOT)}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    assert files == built


def test_sources_that_share_an_object_are_refused():
    support.check_objects(["csrc/cuda/step.cu", "csrc/cuda/bindings.cpp", "csrc/cpu/step.cpp"])
    with pytest.raises(support.BuildError, match=r"step.cpp and csrc/cuda/step.cu"):
        support.check_objects(["csrc/cuda/step.cpp", "csrc/cuda/step.cu"])


# ---- what was built ----


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize("library", ["_C", "_C_cuda"])
def test_library_uses_the_stable_abi_only(library):
    path = ROOT / "epi_kernels" / f"{library}.abi3.so"
    if not path.exists():
        assert library == "_C_cuda", "make build did not build epi_kernels/_C"
        assert not env._build_info()["cuda"]["built"]
        pytest.skip(env._build_info()["cuda"]["reason"])
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    # Mangled names of at::, c10:: and torch:: belong to no stable ABI.
    assert not re.findall(r"_ZN?K?(?:2at|3c10|5torch)\S*", symbols)
    assert "torch_library_impl" in symbols


def test_build_info_says_why():
    info = json.loads((ROOT / "epi_kernels/_build_info.json").read_text())
    assert info["cuda"]["reason"]
    assert info["cuda"]["built"] == (ROOT / "epi_kernels/_C_cuda.abi3.so").exists()


# ---- setup.py ----


def test_setup_downloads_nothing():
    text = (ROOT / "setup.py").read_text() + (ROOT / "tools/build_support.py").read_text()
    assert not re.search(r"urllib|requests|https?://|curl|wget|git clone|ftplib|socket", text)


def test_setup_without_torch_says_how_to_install(tmp_path):
    blocker = "raise ImportError('no torch in this environment')\n"
    (tmp_path / "torch.py").write_text(blocker)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "lib").exists()


def test_torch_is_no_build_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = (.*)$", text, re.MULTILINE)
    assert "torch" not in requires


@pytest.mark.parametrize(
    ("sys_platform", "platform_machine", "wheels"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("linux", "ppc64le", False),
        ("darwin", "arm64", False),
        ("win32", "AMD64", False),
    ],
)
def test_a_missing_triton_is_a_skip_only_where_it_has_no_wheels(
    monkeypatch, sys_platform, platform_machine, wheels
):
    here = {"sys_platform": sys_platform, "platform_machine": platform_machine}
    assert triton_has_wheels(here) is wheels
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr("python_tests.harness.triton_has_wheels", lambda: wheels)
    with pytest.raises(ModuleNotFoundError if wheels else pytest.skip.Exception):
        need_triton()


def test_version_has_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", epi_kernels.__version__)
    tracked = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "epi_kernels").rglob("*.py")]
    homes = [p for p in tracked if re.search(r"^_*version_* = \"\d", p.read_text(), re.MULTILINE)]
    assert homes == [ROOT / "epi_kernels/__init__.py"]


# ---- make ----


def make_plan(*arguments: str) -> list[str]:
    """The commands make would run."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "TORCH_"))}
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", "").splitlines()


@pytest.mark.parametrize("target", ["test", "demo"])
def test_make_on_a_fresh_clone_starts_with_the_preflight(target, tmp_path):
    plan = make_plan(target, f"VENV={tmp_path}/venv")
    assert "tools/preflight.sh" in plan[0]
    assert "-m venv" in plan[1]
    assert any("--no-build-isolation --editable" in line for line in plan)


def test_torch_index_is_passed_for_torch_alone(tmp_path):
    plan = make_plan("build", f"VENV={tmp_path}/venv", "TORCH_INDEX=an-index")
    (install,) = re.findall(r"-m pip install [^;]*an-index[^;]*;", "\n".join(plan))
    assert re.fullmatch(r'-m pip install --no-deps --index-url "an-index" "torch==[\d.]+";', install)
    plain = "\n".join(make_plan("build", f"VENV={tmp_path}/venv"))
    assert "--index-url" not in plain
    assert plain.count('pip install "torch==') == 1


def test_make_gpu_installs_nothing(tmp_path):
    plan = make_plan("gpu", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", "TIME_LIMIT=60")
    assert not [line for line in plan if re.search(r"\bpip\b|-m venv", line)]
    assert plan[-1] == f"{sys.executable} -m bench.gpu --time-limit 60"


def test_make_reproduce_medium_installs_nothing_and_passes_the_slice_on(tmp_path):
    plan = make_plan(
        "reproduce-medium", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", "TIME_LIMIT=540"
    )
    assert not [line for line in plan if re.search(r"\bpip\b|-m venv", line)]
    (call,) = [line for line in plan if "-m epi_kernels" in line]
    arguments = call.split("-m epi_kernels reproduce ")[1].split()
    assert arguments[:4] == ["--preset", "medium", "--device", "cuda"]
    assert arguments[-2:] == ["--time-limit", "540"]


# ---- the command line ----


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"^    {name}\b", said, re.MULTILINE)
        assert command.summary in " ".join(said.split())


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_describes_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: epi-kernels {name}" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["nonsense"])
    assert stop.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_a_missing_dependency_is_named(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'transformers.models'", name="transformers.models")

    monkeypatch.setattr(env, "run", run)
    assert cli.main(["env"]) == 2
    assert "needs transformers, which is not installed" in capsys.readouterr().err


def test_env_reports_every_part(capsys, monkeypatch):
    monkeypatch.setenv("EPI_KERNELS_NONSENSE", "1")
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "not a variable of ours" in text
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["epi_kernels"] == epi_kernels.__version__
    assert facts["devices"]["cpu"]["isa"] in ("avx512", "avx2", "plain")
    names = [backend["name"] for backend in facts["backends"]]
    assert names == ["triton", "cuda", "cpu", "reference"]
    for backend in facts["backends"]:
        assert backend["reason"]
        assert re.search(rf"{backend['name']} +{'yes' if backend['available'] else 'no '}  \S", text)
    assert facts["backends"][-1]["available"]


def test_environment_variables_stand_in_one_table():
    used = set()
    for folder, pattern in [("epi_kernels", "*.py"), ("tools", "*"), ("csrc", "*"), ("bench", "*.py")]:
        for path in (ROOT / folder).rglob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                used |= set(re.findall(r"\bEPI_KERNELS_[A-Z][A-Z0-9_]*\b", path.read_text()))
    # include guards of headers
    used = {name for name in used if not name.endswith(("_H", "_H_", "_CUH", "_CUH_"))}
    assert used == set(env.ENVIRONMENT_VARIABLES)
