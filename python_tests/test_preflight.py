"""tools/preflight.sh names each missing piece, with the line that installs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TOOLS = ["awk", "cat", "dirname", "head", "sh", "uname"]

FAKE_PYTHON = """#!/bin/sh
case "$2" in
    *version_info*) echo {version}; exit {old} ;;
    *ensurepip*) exit {venv} ;;
    *Python.h*) exit {headers} ;;
    *CXX*) echo "" ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """A machine on which only what is asked for exists; returns a function that runs preflight."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (bin_dir / tool).symlink_to(found)

    def run(
        python=True, version="3.12", old=0, venv=0, headers=0, cxx=0, disk_mb=50_000, apt=True, **environ
    ):
        if python:
            script(
                bin_dir / "python3",
                FAKE_PYTHON.format(version=version, old=old, venv=venv, headers=headers),
            )
        if cxx is not None:
            script(bin_dir / "c++", f"#!/bin/sh\ncat >/dev/null\necho 'fatal: bits' >&2\nexit {cxx}\n")
        if apt:
            script(bin_dir / "apt-get", "#!/bin/sh\n")
        script(
            bin_dir / "df",
            f"#!/bin/sh\necho Filesystem\necho /dev/x 1 1 {disk_mb * 1024} 1% /\n",
        )
        done = subprocess.run(
            [shutil.which("sh"), ROOT / "tools/preflight.sh", "python3", tmp_path],
            env={"PATH": str(bin_dir), **environ},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    return run


def test_preflight_passes_on_a_complete_machine(machine):
    assert machine() == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="checks the lines for Debian")
@pytest.mark.parametrize(
    ("lack", "named", "line"),
    [
        ({"python": False}, "Python 3.10 or newer", "apt-get install python3 "),
        ({"version": "3.9", "old": 1}, "'python3' is 3.9", "apt-get install python3 "),
        ({"venv": 1}, "venv module", "sudo apt-get install python3.12-venv"),
        ({"headers": 1}, "Python.h of Python 3.12", "sudo apt-get install python3.12-dev"),
        ({"cxx": None}, "a C++ compiler", "sudo apt-get install g++"),
        ({"cxx": 1}, "'c++' failed: fatal: bits", "sudo apt-get install g++"),
        ({"disk_mb": 900}, "900 MB free", "make VENV="),
    ],
)
def test_preflight_names_what_is_missing(machine, lack, named, line):
    status, said = machine(**lack)
    assert status == 1
    assert named in said
    assert line in said
    assert "1 missing; nothing was created" in said


def test_preflight_lists_everything_at_once(machine):
    status, said = machine(venv=1, headers=1, cxx=None)
    assert status == 1
    assert "3 missing" in said


@pytest.mark.skipif(sys.platform != "linux", reason="on macOS only its own line is shown")
def test_preflight_without_a_known_package_manager_shows_all_lines(machine):
    _, said = machine(cxx=None, apt=False)
    assert "apt-get install g++" in said
    assert "dnf install gcc-c++" in said
    assert "xcode-select --install" in said


@pytest.mark.skipif(sys.platform != "linux", reason="torch has CUDA on Linux only")
def test_preflight_notes_a_tight_disk_unless_an_index_is_chosen(machine):
    status, said = machine(disk_mb=6_000)
    assert status == 0
    assert "TORCH_INDEX" in said
    assert machine(disk_mb=6_000, TORCH_INDEX="somewhere") == (0, "")
