"""`epi-kernels finetune` and other commands on forked ranks: how they end, what they say, and what is put in their way."""

from __future__ import annotations

import contextlib
import io
import signal

import pytest
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401  once, before the ranks are forked
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401

from epi_kernels.finetune import command as finetune
from python_tests.ranks import on_ranks
from python_tests.stopped_runs import signalled
from python_tests.tiny_model import command


class Ended:
    """How one rank's command ended, and what it said."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


def run(rank: int, given: list, prepare=None, module=finetune) -> Ended:
    """`prepare`: rank -> a context in which the command runs there."""
    out, err = io.StringIO(), io.StringIO()
    around = contextlib.nullcontext() if prepare is None else prepare(rank)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), around:
        status = command(module, *given)
    return Ended(status, out.getvalue(), err.getvalue())


def started(n_ranks: int, *given, prepare=None, module=finetune) -> list[Ended]:
    return on_ranks(n_ranks, run, list(given), prepare, module)


class Signal:
    """One rank gets the signal; all must stop."""

    def __init__(self, rank: int, after: int, label: str = "isolation"):
        self.rank, self.after, self.label = rank, after, label

    def __call__(self, rank: int):
        if rank != self.rank:
            return contextlib.nullcontext()
        return signalled(self.after, signal.SIGTERM, self.label)


def breaks(at: int, error: BaseException):
    """For `Patch`: a step that raises `error` at this index."""

    def make(step):
        def stepped(self, index):
            if index == at:
                raise error
            return step(self, index)

        return stepped

    return make


class Patch:
    """`target.name` is replaced on one rank (None: on all) by a function that `make`s of the original."""

    def __init__(self, rank, target, name, make):
        self.rank, self.target, self.name, self.make = rank, target, name, make

    @contextlib.contextmanager
    def __call__(self, rank: int):
        with pytest.MonkeyPatch.context() as patched:
            if self.rank in (None, rank):
                patched.setattr(self.target, self.name, self.make(getattr(self.target, self.name)))
            yield
