"""Files and optimizers that save_isolation and load_isolation refuse: nothing has changed then, nothing is written."""

from __future__ import annotations

import errno
import json
import os
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from epi_kernels import MaskedEMAAdamW, load_isolation, save_isolation
from python_tests.exchange_runs import model, trained
from python_tests.harness import make, snapshot, train
from python_tests.ranks import on_ranks
from python_tests.sharded_net import contents, differing, made, steps


def _record(name, **changes):
    def change(tensors, metadata):
        records = json.loads(metadata["parameters"])
        records[name] |= changes
        metadata["parameters"] = json.dumps(records)

    return change


def _tensor(name, change):
    return lambda tensors, metadata: tensors.__setitem__(name, change(tensors[name]))


def _meta(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


MASK = "isolation_mask/block.bias"  # 7 elements
DAMAGE = {
    "version": (_meta("version", "2"), "version '2'"),
    "format": (_meta("format", "epi-kernels importance"), "not written by save_isolation"),
    "no-metadata": (lambda tensors, metadata: metadata.clear(), "not written by save_isolation"),
    "no-parameters": (lambda tensors, metadata: metadata.pop("parameters"), "damaged"),
    "half-parameters": (_meta("parameters", '{"embed": {'), "damaged"),
    "parameters-that-are-none": (_meta("parameters", "[1]"), "damaged"),
    "no-T": (_meta("isolation_step", "many"), "damaged"),
    "shape": (_record("scale", shape=[1]), r"another model: scale is \[1\]"),
    "shape-of-text": (_record("scale", shape=["a"]), "damaged"),
    "beta": (_record("embed", beta=1.0), "beta 1.0"),
    "step": (_record("embed", step=-1), "step -1"),
    "importance-shape": (_tensor("embed", lambda one: one[:-1]), r"importance of embed must be floats"),
    "importance-integers": (_tensor("embed", lambda one: one.int()), "must be floats"),
    "importance-half": (_tensor("embed", lambda one: one.half()), "must be floats"),
    "no-importance": (lambda tensors, metadata: tensors.pop("embed"), "the importance of embed is not in it"),
    "importance-negative": (
        _tensor("embed", torch.neg),
        "embed has values that are negative or not a number",
    ),
    "importance-nan": (_tensor("embed", lambda one: one / 0 * 0), "negative or not a number"),
    "no-mask": (lambda tensors, metadata: tensors.pop(MASK), "the isolation_mask of block.bias is not in it"),
    "no-persistent-mask": (
        lambda tensors, metadata: tensors.pop("persistent_mask/embed"),
        "the persistent_mask of embed is not in it",
    ),
    "stranger": (
        lambda tensors, metadata: tensors.update(other=torch.ones(1)),
        "holds other, of no parameter",
    ),
    "mask-as-bools": (_tensor(MASK, lambda one: torch.ones(7, dtype=torch.bool)), "must be packed"),
    "mask-longer": (_tensor(MASK, lambda one: torch.zeros(2, dtype=torch.uint8)), r"is uint8 \[1\]"),
    "mask-cut": (_tensor(MASK, lambda one: one[:0]), r"is uint8 \[1\]"),
    "padding": (_tensor(MASK, lambda one: one | 128), "padding bits"),
    "persistent-padding": (_tensor("persistent_mask/embed", lambda one: one | 128), "padding bits"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "file"
    save_isolation(trained()[1], path)
    return path


def refused(path, match, params=None):
    """By an optimizer that has not stepped and by one that has; both are as before, and work."""
    for n in (0, 3):
        mine = model(seed=1) if params is None else params
        optimizer = make(mine)
        train(optimizer, mine, n)
        before, report = snapshot(optimizer), optimizer.isolation_report()
        with pytest.raises(ValueError, match=match) as raised:
            load_isolation(optimizer, path)
        assert str(path) in str(raised.value)
        assert snapshot(optimizer) == before and optimizer.isolation_report() is report
        train(optimizer, mine, range(n, n + 1))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_fit_changes_nothing(saved, tmp_path, damage):
    change, match = DAMAGE[damage]
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    tensors = {name: one.contiguous() for name, one in tensors.items()}
    save_file(tensors, tmp_path / "damaged", metadata)
    refused(tmp_path / "damaged", match)


def test_a_file_cut_off_anywhere_changes_nothing(saved, tmp_path):
    whole = saved.read_bytes()
    for length in {0, 1, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 4)}:
        (tmp_path / "cut").write_bytes(whole[:length])
        refused(tmp_path / "cut", "no whole safetensors file")


def test_a_file_of_an_earlier_release_says_of_no_mask_that_it_is_there(saved, tmp_path):
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    records = json.loads(metadata["parameters"])
    metadata["parameters"] = json.dumps(
        {
            name: {key: one for key, one in record.items() if key != "masks"}
            for name, record in records.items()
        }
    )
    del tensors[MASK]
    save_file(tensors, tmp_path / "file", metadata)
    params = model(seed=1)
    optimizer = make(params)
    load_isolation(optimizer, tmp_path / "file")
    assert not optimizer.isolation_mask(params["block.bias"]).any()
    assert optimizer.isolation_mask(params["embed"]).any()


def test_another_model_is_refused_by_the_names_that_differ(saved):
    fewer = {name: p for name, p in model().items() if name != "head.weight"}
    refused(saved, "another model: head.weight is not in the optimizer", fewer)
    more = model() | {"late": torch.nn.Parameter(torch.ones(3))}
    refused(saved, "another model: late is not in the file", more)
    turned = model() | {"head.weight": torch.nn.Parameter(torch.ones(67, 65))}
    refused(saved, r"head.weight is \[65, 67\] in the file, \[67, 65\] in the optimizer", turned)


def test_no_such_file(tmp_path):
    with pytest.raises(OSError):
        load_isolation(make(model()), tmp_path / "none")


def test_optimizers_that_no_file_can_hold(saved, tmp_path):
    p = torch.nn.Parameter(torch.ones(3))
    unnamed = MaskedEMAAdamW([p], backend="reference")
    for call in (save_isolation, load_isolation):
        with pytest.raises(ValueError, match=r"MaskedEMAAdamW\(model.named_parameters\(\)\)"):
            call(unnamed, saved)
        with pytest.raises(TypeError, match="MaskedEMAAdamW"):
            call(torch.optim.AdamW([("p", p)]), saved)  # type: ignore[arg-type]
    for names in (("__metadata__",), ("isolation_mask/x",), ("module.x", "x")):
        named = [(name, torch.nn.Parameter(torch.ones(3))) for name in names]
        with pytest.raises(ValueError, match="another name"):
            save_isolation(MaskedEMAAdamW(named, backend="reference"), tmp_path / "file")
    with pytest.raises(ValueError, match="no state"):
        save_isolation(MaskedEMAAdamW([("p", p)], backend="reference"), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["sync", "write"])
def test_a_full_disk_leaves_the_file_before(saved, tmp_path, monkeypatch, fails):
    path = tmp_path / "file"
    path.write_bytes(saved.read_bytes())
    _, source = trained(steps=2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_as_safetensors_says_it(_, partial, __):
        partial.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        if fails == "sync":
            patched.setattr(os, "fsync", full)
        else:
            patched.setattr("safetensors.torch.save_file", full_as_safetensors_says_it)
        save_isolation(source, path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and path.read_bytes() == saved.read_bytes()
    save_isolation(source, path)
    assert path.read_bytes() != saved.read_bytes()


def one_rank_refuses(rank: int, folder: str, damage: str, masks_alone: bool):
    net, optimizer = made("float32", sharded=True)
    steps(net, optimizer, 0, 3)
    path = f"{folder}/{rank}"  # each rank reads its own copy, as on machines without a common disk
    save_isolation(optimizer, f"{folder}/both")
    data = open(f"{folder}/both", "rb").read()
    if rank == 0 or damage == "cut off":
        open(path, "wb").write(data[: len(data) // (rank + 1)])
    before = contents(net, optimizer)
    try:
        load_isolation(optimizer, path, importance=not masks_alone)
    except (ValueError, OSError) as error:
        return str(error), differing(contents(net, optimizer), before)
    return None


@pytest.mark.parametrize("damage, masks_alone", [("cut off", False), ("lost", True)])
def test_a_file_that_one_rank_refuses_is_loaded_on_none(damage, masks_alone, tmp_path):
    first, second = on_ranks(2, one_rank_refuses, str(tmp_path), damage, masks_alone, timeout=60)
    assert "another rank refused" in first[0] and str(tmp_path / "1") in second[0]
    assert first[1] == second[1] == []
