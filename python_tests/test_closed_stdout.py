"""`epi-kernels ... | head`: a reader that leaves ends a command without a word."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from epi_kernels import cli
from python_tests.harness import ROOT

PROGRAM = "from epi_kernels.cli import program; program()"


def into_a_closed_pipe(
    *arguments: str, code: str = PROGRAM, unbuffered: str = ""
) -> subprocess.CompletedProcess:
    """A process whose stdout nobody reads from the start."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)


def test_a_command_ends_quietly():
    done = into_a_closed_pipe("env")
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at-the-end", "at-once"])
def test_it_ends_quietly_wherever_the_pipe_breaks(unbuffered: str):
    """Buffered, nothing is written until the process ends; unbuffered, the first print fails."""
    done = into_a_closed_pipe(code=ends_with("print('so far'); return 0"), unbuffered=unbuffered)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_ends_quietly(arguments: list[str]):
    done = into_a_closed_pipe(*arguments)
    assert done.returncode in (0, 1) and done.stderr == ""


def ends_with(statement: str) -> str:
    """A program whose command does this."""
    return f"from epi_kernels import cli\ndef main():\n    {statement}\ncli.main = main\ncli.program()"


def test_what_the_user_can_mend_is_said_all_the_same():
    done = into_a_closed_pipe(code=ends_with("print('so far'); raise SystemExit('no such file: x')"))
    assert done.returncode == 1 and done.stderr == "no such file: x\n"


def test_another_broken_pipe_is_an_error():
    done = into_a_closed_pipe(code=ends_with("raise ValueError('a bug')"))
    assert done.returncode == 1 and "ValueError: a bug" in done.stderr
    code = ends_with("raise BrokenPipeError('of a worker')")
    read = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert read.returncode == 1 and "BrokenPipeError: of a worker" in read.stderr


def test_every_command_goes_through_it():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'epi-kernels = "epi_kernels.cli:program"' in text and callable(cli.program)
    assert "program()" in (ROOT / "epi_kernels" / "__main__.py").read_text()
