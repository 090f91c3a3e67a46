"""Runs that are stopped and resumed: their arguments, what stops them, and what must be the same at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from epi_kernels.finetune import checkpoint, log, train
from epi_kernels.finetune import command as finetune
from python_tests.finetune_runs import weights
from python_tests.tiny_model import backend, command, qa, save_tiny, write_config, write_jsonl

STEPS = 9


def write_inputs(folder: Path) -> Path:
    write_jsonl(folder / "qa.jsonl", qa(20))
    write_jsonl(folder / "old.jsonl", qa(4, first=100))
    write_config(folder, attention_dropout=0.1)
    save_tiny(folder / "model")
    return folder


def arguments(files, out, *more, model="config-tiny.json"):
    """Refreshes after steps 2, 4, ...; checkpoints after 3 and 6: masks, moments, dropout and schedule are all underway."""
    common = ["--max-length", 48, "--batch-size", 1, "--accumulation", 2, "--lr", 3e-3, "--max-steps", STEPS]
    common += ["--mask-interval", 2, "--isolation-ratio", 0.1, "--checkpoint-every", 3]
    inputs = ["--model", files / model, "--data", files / "qa.jsonl", "--retain", files / "old.jsonl"]
    return [*inputs, "--out", out, *common, "--backend", backend(), "--quiet", *more]


def final_state(out):
    """Weights, and everything of the optimizer, after the last step."""
    last = checkpoint.list_checkpoints(out)[-1]
    assert checkpoint.load_state(last)["step"] == STEPS
    optimizer = checkpoint.load_optimizer(last)["optimizer"]
    tensors = {f"{i} {name}": value for i, one in optimizer["state"].items() for name, value in one.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]]
    return weights(out), tensors, groups


def assert_same_end(out, other):
    for mine, theirs in zip(final_state(out)[:2], final_state(other)[:2], strict=True):
        assert mine.keys() == theirs.keys() and mine
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert final_state(out)[2] == final_state(other)[2]


def story(out):
    """The log without what may differ: times, and where it was resumed."""
    untold = ("time", "seconds", "options", "environment", "peak_memory_bytes")
    return [
        {key: value for key, value in event.items() if key not in untold}
        for event in log.read(out / "log.jsonl")
        if event["event"] != "resume"
    ]


def whole_run(files, out):
    """`out`, with a run that nothing stopped."""
    assert command(finetune, *arguments(files, out)) == 0
    return out


def resume(out, *more):
    return command(finetune, "--out", out, "--resume", *more)


@contextlib.contextmanager
def signalled(after: int, number: int = signal.SIGINT, label: str = "isolation"):
    """The process gets the signal in the step that follows `after` steps of the run with this label."""
    step = train.Run.step

    def interrupted(self, index):
        if self.label == label and index == after:
            os.kill(os.getpid(), number)
        return step(self, index)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.Run, "step", interrupted)
        yield


def stopped_run(files: Path, folder: Path) -> tuple[Path, Path]:
    """(inputs that can be changed, a run of them interrupted after step 4)."""
    mine, out = folder / "inputs", folder / "out"
    shutil.copytree(files, mine)
    with signalled(3):
        assert command(finetune, *arguments(mine, out, model="model")) == 130
    return mine, out


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file with its content."""
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def forget_sizes(folder: Path) -> None:
    """A checkpoint as if its files were changed without a change of their lengths."""
    state = json.loads((folder / "state.json").read_text())
    del state["files"]
    (folder / "state.json").write_text(json.dumps(state))
