"""Checkpoints fused slice by slice in bounded memory, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from epi_kernels.finetune import checkpoint as finetune_checkpoint
from epi_kernels.finetune.checkpoint import DiskFull
from epi_kernels.isolation import (
    IsolationError,
    MemoryCore,
    checkpoints,
    find_core,
    fuse,
    fuse_checkpoints,
)
from epi_kernels.isolation.checkpoints import Checkpoint
from python_tests.fused_models import models

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, tensors, shards: int = 1, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_attention_heads": 4} | config)
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not a model's")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def three(tmp_path):
    """A base in two shards, two tasks of it, their cores."""
    base, tuned = models(2, torch.bfloat16)
    whole = base | {"positions": torch.arange(6)}
    paths = [write(tmp_path / "base", whole, shards=2)]
    paths += [
        write(tmp_path / f"task{i}", one | {"positions": torch.arange(6)}) for i, one in enumerate(tuned)
    ]
    return paths, base, tuned, [find_core(base, one, 0.05) for one in tuned]


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 600, 1])
def test_checkpoints_fuse_to_the_same_bits(three, tmp_path, monkeypatch, max_shard_bytes):
    (base_path, *task_paths), base, tuned, cores = three
    monkeypatch.setattr(checkpoints, "SLICE", 64)
    expected, in_memory = fuse(base, tuned, cores)
    seen, out = [], tmp_path / "out"
    report = fuse_checkpoints(
        base_path, task_paths, cores, out, max_shard_bytes=max_shard_bytes, advance=seen.append
    )
    assert (report.slerp, report.linear) == (in_memory.slerp, in_memory.linear)
    assert report.core_elements == in_memory.core_elements
    np.testing.assert_equal(report.angles, in_memory.angles)
    assert sum(seen) == 2 * report.elements
    written = Checkpoint(out)
    assert written.tensors.keys() == base.keys() | {"positions"}
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes > 10_000)
    loaded = {name: one for file in files for name, one in load_file(out / file).items()}
    for name, one in expected.items():
        assert torch.equal(loaded[name], one), name
    assert torch.equal(loaded["positions"], torch.arange(6))
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(one.nbytes for one in loaded.values())
        assert sorted(set(index["weight_map"].values())) == files
    assert (out / "config.json").read_bytes() == (base_path / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists() and not (out / "optimizer.pt").exists()
    notes = json.loads((out / "fusion.json").read_text())
    assert notes["method"] == "slerp" and notes["tuned"] == list(map(str, task_paths))
    again = tmp_path / "again"
    fuse_checkpoints(base_path, task_paths, cores, again, max_shard_bytes=max_shard_bytes)
    for file in files:
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_the_result_has_the_bases_dtype(tmp_path):
    base, tuned = models(1, torch.bfloat16)
    wide = {name: one.float() for name, one in tuned[0].items()}
    fused, _ = fuse(base, [wide], [find_core(base, wide, 0.05)])
    assert {one.dtype for one in fused.values()} == {torch.bfloat16}


def test_tensors_of_every_width_lie_where_readers_can_map_them(tmp_path):
    base = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "n": torch.arange(2),
        "w": torch.ones(5),
        "z": torch.ones(1).double(),
    }
    folder = write(tmp_path / "base", base, shards=2)  # in the order of the index: narrow ones first
    fuse_checkpoints(folder, [folder], [], tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, one in base.items():
        assert (8 + length + header[name]["data_offsets"][0]) % one.element_size() == 0, name
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], one) for name, one in base.items())


def test_a_fused_model_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    from python_tests.tiny_model import save_tiny

    folders = [save_tiny(tmp_path / f"m{seed}", seed=seed) for seed in range(3)]
    core = find_core(folders[0], folders[1], 0.1)
    out = tmp_path / "out"
    fuse_checkpoints(folders[0], folders[1:], [core, find_core(folders[0], folders[2], 0.1)], out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    named, fused = dict(loaded.named_parameters()), load_file(out / "model.safetensors")
    assert named.keys() == fused.keys() and all(torch.equal(named[name], fused[name]) for name in named)
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


OLD = {"rope_theta": 10000.0, "rope_scaling": None}  # as transformers 4 writes it
NEW = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
STRETCHED = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
BY_LAYER = {
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
}


@pytest.mark.parametrize(
    ("base", "tuned", "differs"),
    [
        (OLD, NEW, None),
        (NEW, OLD, None),
        ({}, NEW, None),  # a config that leaves it to the architecture's default
        (BY_LAYER, BY_LAYER, None),
        (
            NEW,
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_parameters.rope_theta is 500000",
        ),
        (
            OLD,
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_parameters.rope_theta is 500000",
        ),
        (OLD, {"rope_theta": 5e5}, "rope_parameters.rope_theta is 500000"),
        (NEW, STRETCHED, "rope_parameters.rope_type is 'linear'"),
        (
            BY_LAYER,
            {"rope_parameters": BY_LAYER["rope_parameters"] | {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters.full_attention.rope_theta is 10000",
        ),
        (
            {"text_config": {"num_attention_heads": 4} | NEW},
            {"text_config": {"num_attention_heads": 8} | NEW},
            "text_config.num_attention_heads is 8",
        ),
    ],
)
def test_weights_that_are_read_otherwise_are_of_another_architecture(tmp_path, base, tuned, differs):
    """Shapes agree in all of these: blended, such weights fit neither config."""
    tensors = {"w": torch.ones(4, 4)}
    first, second = write(tmp_path / "base", tensors, **base), write(tmp_path / "task", tensors, **tuned)
    if differs is None:
        assert fuse_checkpoints(first, [second], [], tmp_path / "out").elements == 16
        return
    with pytest.raises(IsolationError, match=differs):
        fuse_checkpoints(first, [second], [], tmp_path / "out")
    with pytest.raises(IsolationError, match=differs):
        find_core(first, second)
    assert not (tmp_path / "out").exists()


def test_refusals_lose_nothing(three, tmp_path):
    (base_path, *task_paths), base, tuned, cores = three
    out = tmp_path / "out"
    positions = {"positions": torch.arange(6)}

    def refused(match, tasks=task_paths, cores=cores, base=base_path, out=out, error=IsolationError, **more):
        before = snapshot(tmp_path)
        with pytest.raises(error, match=match):
            fuse_checkpoints(base, tasks, cores, out, **more)
        assert snapshot(tmp_path) == before
        assert not list(tmp_path.glob(".partial*"))

    wider = tuned[0] | positions | {"w": torch.ones(37, 54, dtype=torch.bfloat16)}
    refused(
        r"wider: of another architecture than .*base: w is \[37, 54\], in .*base \[37, 53\]",
        [write(tmp_path / "wider", wider), task_paths[1]],
    )
    deeper = tuned[0] | positions | {"more": torch.ones(2)}
    refused("more is not in .*base", [task_paths[0], write(tmp_path / "deeper", deeper)])
    fewer = tuned[0]
    refused("positions is missing", [write(tmp_path / "fewer", fewer), task_paths[1]])
    heads = write(tmp_path / "heads", tuned[0] | positions, num_attention_heads=8)
    refused("its config's num_attention_heads is 8, there 4", [heads, task_paths[1]])
    moved = write(tmp_path / "moved", tuned[0] | {"positions": torch.arange(6) + 1})
    refused(r"positions \(I64\) differs", [moved, task_paths[1]])
    integers = write(tmp_path / "integers", tuned[0] | positions | {"b": torch.arange(7)})
    refused("b is I64, in .* BF16", [integers, task_paths[1]])
    for bad in (math.nan, math.inf):
        broken = {name: one.clone() for name, one in tuned[0].items()} | positions
        broken["w"][3, 4] = bad
        path = write(tmp_path / f"broken{bad}", broken)
        refused("broken.*: w is not finite", [task_paths[1], path])
        refused("w: the fused tensor is not finite", [task_paths[1], path], method="linear", cores=())
    other = MemoryCore.from_bools({"w": torch.zeros(3, dtype=torch.bool)}, "another's core")
    refused("another's core: of another architecture", cores=[cores[0], other])
    refused(r"2 tuned checkpoints need 2 cores \(or none\), got 1", cores=cores[:1])
    refused("at least one tuned", tasks=[], cores=[])
    refused("method is 'mean'; allowed: slerp, linear", method="mean")
    refused("omega is 1.5; allowed: 0 to 1", omega=1.5)
    refused("eps is -1; allowed", eps=-1)
    refused("max_shard_bytes is 0", max_shard_bytes=0)
    refused("exists and is not an empty directory", out=task_paths[0])
    refused("no such file or directory", base=tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    refused("holds no model.safetensors", base=tmp_path / "bare")
    cut = shutil.copytree(task_paths[0], tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-7])
    refused("cut/model.safetensors: not a whole safetensors file", [cut, task_paths[1]])
    astray = shutil.copytree(base_path, tmp_path / "astray")
    index = astray / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "part-1.safetensors"}}))
    refused("says that w is in part-1.safetensors, but it is not", base=astray)
    index.write_text(json.dumps({"weight_map": {"w": "../base/part-0.safetensors"}}))
    refused("outside its directory", base=astray)
    index.write_text("{")
    refused("index.json: cannot be read", base=astray)
    (astray / "part-0.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"w": "part-0.safetensors"}}))
    refused("part-0.safetensors: no such file", base=astray)


def test_a_full_disk_or_an_interruption_leaves_nothing(three, tmp_path, monkeypatch):
    (base_path, *task_paths), _, _, cores = three
    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(DiskFull, match=r"out: needs .* its disk has 1 B left"):
        fuse_checkpoints(base_path, task_paths, cores, out)
    monkeypatch.undo()

    def stopped(error):
        def advance(elements):
            raise error

        before = snapshot(tmp_path)
        with pytest.raises((DiskFull, KeyboardInterrupt)):
            fuse_checkpoints(base_path, task_paths, cores, out, advance=advance)
        assert snapshot(tmp_path) == before and not out.exists() and not list(tmp_path.glob(".partial*"))

    stopped(KeyboardInterrupt())
    stopped(OSError(28, "No space left on device"))
    assert finetune_checkpoint.TEMPORARY == ".partial-"  # what the globs look for


MEMORY = """
import sys, torch
from epi_kernels.isolation import fuse_checkpoints, save_core
base, one, two, folder = sys.argv[1:]
def peak():  # not ru_maxrss: a child begins with its parent's
    try:
        status = open("/proc/self/status").read()
    except FileNotFoundError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
torch.ones(1 << 20).bfloat16()  # what the first kernels load
before = peak()
cores = [f"{folder}/core{i}" for i in range(2)]
for tuned, core in zip((one, two), cores):
    save_core(base, tuned, core)
fuse_checkpoints(base, [one, two], cores, f"{folder}/out", max_shard_bytes=60_000_000)
print(peak() - before, peak())
"""


@pytest.mark.parametrize("numel", [100_000_000, pytest.param(1_000_000_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(tmp_path, numel):
    """Peak resident memory, pages of files included, of cores and fusion of three bfloat16 checkpoints of random weights:
    of the whole process at most 1.2 times a checkpoint of 2 GB."""
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 1 << 14, (numel,), dtype=torch.int16, generator=rng).view(torch.bfloat16)
        most = numel // 5 * 3
        write(tmp_path / str(seed), {"a": noise[:most].view(6000, -1).clone(), "b": noise[most:].clone()})
        del noise
    folders = [str(tmp_path / str(seed)) for seed in range(3)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *folders, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    added, whole = map(int, done.stdout.split())
    assert added < 100_000_000  # slices of a few tensors, not the tensors
    assert whole < 1.2 * 2 * 1_000_000_000
    shutil.rmtree(tmp_path)
