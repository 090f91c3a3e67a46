"""A checkpoint that is cut off or damaged is refused by the name of the file; nothing is half loaded, nothing written."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from epi_kernels.finetune import checkpoint
from python_tests.stopped_runs import forget_sizes, resume, stopped_run, tree, write_inputs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture
def stopped(files, tmp_path):
    return stopped_run(files, tmp_path)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def drop_a_moment(path):
    both = torch.load(path, weights_only=True)
    del both["optimizer"]["state"][3]["exp_avg_sq"]
    torch.save(both, path)


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("model.safetensors", flip_a_bit, "not those that were saved"),
        ("model.safetensors", halve, "cannot be loaded"),
        ("config.json", halve, "cannot be loaded"),
        ("optimizer.pt", halve, "optimizer.pt: cannot be read"),
        ("optimizer.pt", lambda path: path.write_bytes(b"no archive"), "optimizer.pt: cannot be read"),
        ("optimizer.pt", lambda path: torch.save({"optimizer": {}}, path), "optimizer.pt: cannot be read"),
        ("optimizer.pt", drop_a_moment, "optimizer.pt: the optimizer refuses it"),
        ("state.json", halve, "state.json: not a checkpoint"),
        ("state.json", lambda path: path.write_text("{}"), "state.json: not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_recognised(stopped, capsys, name, damage, said):
    _, out = stopped
    (last,) = checkpoint.list_checkpoints(out)[-1:]
    forget_sizes(last)
    damage(last / name)
    before = tree(out)
    assert resume(out) == 1
    text = capsys.readouterr().err
    assert said in text and f"remove {last} to resume from the checkpoint before it" in text
    assert tree(out) == before
    shutil.rmtree(last)
    assert resume(out) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "tokenizer.json"])
def test_a_file_cut_off_anywhere_is_named_and_nothing_changes(stopped, capsys, name):
    _, out = stopped
    (last,) = checkpoint.list_checkpoints(out)[-1:]
    whole = (last / name).read_bytes()
    lengths = {0, 1, len(whole) - 2, *random.Random(name).sample(range(len(whole) - 1), 4)}
    for length in sorted(lengths):
        (last / name).write_bytes(whole[:length])
        before = tree(out)
        capsys.readouterr()
        assert resume(out) == 1, f"cut to {length} of {len(whole)} bytes"
        text = capsys.readouterr().err
        assert f"{last / name}: " in text and f"remove {last} to resume from the checkpoint before it" in text
        assert name == "state.json" or f"{length} bytes, not the {len(whole)} that were written" in text
        assert tree(out) == before
    if name != "state.json":  # without it a directory is no checkpoint
        (last / name).unlink()
        assert resume(out) == 1
        assert f"{last / name}: missing" in capsys.readouterr().err
    (last / name).write_bytes(whole)
    assert resume(out) == 0
