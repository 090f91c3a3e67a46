"""Runs of `epi-kernels` in processes of their own that start at once: forked from one that has imported everything.

`python -m python_tests.fork_server` reads pairs of lines from standard input. A JSON list of the program's arguments:
it forks a process and prints its id. An empty line: it waits for that process and prints its exit status (negative:
the signal that ended it). Until then the id is nobody else's, so that a kill that comes too late hits nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Server:
    """The other end of the pipes."""

    process: subprocess.Popen

    def start(self, arguments: list[object]) -> int:
        """Begins a run; returns its process id. `wait` before the next."""
        return self._ask(json.dumps([str(one) for one in arguments]))

    def wait(self) -> int:
        """Exit status of the run, after its end."""
        return self._ask("")

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the fork server ended with {self.process.wait()}"
        return int(line)


@contextlib.contextmanager
def serving(output: IO[bytes]) -> Iterator[Server]:
    """A server; `output` takes what its runs print."""
    # One thread: OpenMP's own would not be there after a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, "-m", "python_tests.fork_server"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
    ) as process:
        try:
            yield Server(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _run(arguments: list[str]) -> None:
    """The forked process: never returns."""
    status = 70
    try:
        os.dup2(2, 1)
        from epi_kernels.cli import main

        status = main(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401

    import epi_kernels.finetune.command  # noqa: F401
    from epi_kernels.optim import MaskedEMAAdamW  # noqa: F401

    assert torch.get_num_threads() == 1
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _run(json.loads(line))
        print(process, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
