"""`epi-kernels COMMAND`: a table of commands and nothing else.

Each command lives in a module with `add_arguments(parser)` and `run(args) -> int` (the exit
status). Only the module of the command asked for is imported, so `epi-kernels --help` needs
neither torch nor transformers. A command reports what the user can mend by raising
`SystemExit("message")`; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, TextIO

import epi_kernels


class Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "env": Command("epi_kernels.env", "versions, devices, and why each backend can or cannot run"),
    "importance": Command(
        "epi_kernels.finetune.importance_command",
        "measure which weights old abilities need, from data that stands for them",
    ),
    "finetune": Command("epi_kernels.finetune.command", "fine-tune a causal language model with isolation"),
    "isolate": Command(
        "epi_kernels.isolation.command", "CPI-FT on checkpoints: core regions, groups of tasks, fusion"
    ),
    "memory": Command(
        "epi_kernels.memory", "what a model and each optimizer take, from the model's config alone"
    ),
    "report": Command("epi_kernels.report.command", "a run's log as one self-contained HTML page"),
    "demo": Command("epi_kernels.demo.command", "learn a task, then another: with isolation and without"),
    "reproduce": Command("epi_kernels.repro.command", "both papers' tables, at the size this machine allows"),
    "kernels": Command(
        "epi_kernels.kernels_report",
        "compile every kernel ahead of time: registers, spills, instructions (no GPU needed)",
    ),
}


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The whole parser; only `chosen`'s module is imported, for its arguments."""
    parser = argparse.ArgumentParser(
        prog="epi-kernels",
        description="AdamW with evolving parameter isolation inside the fused step.",
        epilog="epi-kernels COMMAND --help describes a command's arguments.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16, width=100),
    )
    parser.add_argument("--version", action="version", version=epi_kernels.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        args = build_parser(chosen).parse_args(arguments)
        return int(args.run(args) or 0)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "epi_kernels"):
            raise
        print(
            f"epi-kernels {chosen}: needs {missing}, which is not installed: python -m pip install {missing}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"epi-kernels {chosen}: interrupted", file=sys.stderr)
        return 130


def _flush(stream: TextIO | None) -> None:
    """A process that was started without the stream has None."""
    if stream is not None:
        stream.flush()


def _reader_left() -> bool:
    """Whether nobody reads stdout any more: a broken pipe may be another one, which is an error to be seen."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def program() -> NoReturn:
    """`main`, and the end of the process.

    A reader of stdout that left (`| head`) ends it without a word, exit status 1, as in the documentation of Python's
    `signal`. One of several ranks ends without tearing down its C++ objects: threads of a process group that outlive them abort it
    now and then, after all its work is done, and a launcher then reports a failure.
    """
    status, ended = 1, None
    try:
        try:
            status = main()
        except SystemExit as end:  # --help, or what the user can mend
            ended = end
        _flush(sys.stdout)  # here: the interpreter's own last flush prints a traceback
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for that last flush
        status = 1
    if ended is not None:
        raise ended
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
