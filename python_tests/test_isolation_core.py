"""Core regions against a sort in numpy, and the files they are kept in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from epi_kernels import MaskedEMAAdamW, save_isolation
from epi_kernels.backends import dispatch
from epi_kernels.isolation import (
    CoreFile,
    IsolationError,
    MemoryCore,
    checkpoints,
    core,
    find_core,
    freeze,
    fuse,
    save_core,
)
from epi_kernels.isolation.core_file import union_mask
from epi_kernels.reference.bits import pack
from python_tests import oracle_isolation as oracle
from python_tests.oracle_isolation import make_model

SHAPES = {"w": (37, 53), "scalar": (), "b": (7,), "empty": (0, 4), "v": (129,)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bools(found) -> np.ndarray:
    return np.concatenate([union_mask([found], name).numpy().reshape(-1) for name in found.shapes])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.0001, 0.01, 0.3, 0.999])
def test_core_is_that_of_a_sort(monkeypatch, backend, dtype, ratio):
    chosen = dispatch.load(backend)
    assert not isinstance(chosen, str), chosen
    monkeypatch.setattr(core, "_backend", lambda: chosen)
    monkeypatch.setattr(checkpoints, "SLICE", 64)  # tensors in several slices
    base = make_model(0, SHAPES, dtype)
    tuned = make_model(1, SHAPES, dtype, base)
    assert np.array_equal(bools(find_core(base, tuned, ratio)), oracle.core(base, tuned, ratio))


@given(
    st.lists(st.integers(0, 40), max_size=4),
    st.floats(0, 0.999),
    st.integers(0, 1000),
    st.sampled_from([1.0, 1e-42, 1e30]),
)
def test_ties_are_all_in_and_the_unmoved_out(sizes, ratio, seed, scale):
    """Few distinct distances, zero among them, from denormal to huge."""
    rng = np.random.default_rng(seed)
    base = {f"t{i}": torch.zeros(n) for i, n in enumerate(sizes)}
    tuned = {
        name: torch.from_numpy(rng.integers(-3, 4, one.numel()) * np.float32(scale)).float()
        for name, one in base.items()
    }
    found = find_core(base, tuned, ratio)
    expected = oracle.core(base, tuned, ratio) if sizes else np.zeros(0, dtype=bool)
    assert np.array_equal(bools(found) if sizes else np.zeros(0, dtype=bool), expected)


def test_dtypes_may_differ_between_base_and_run():
    base = make_model(0, SHAPES, torch.bfloat16)
    tuned = make_model(1, SHAPES, torch.float32, base)
    assert np.array_equal(bools(find_core(base, tuned, 0.05)), oracle.core(base, tuned, 0.05))


def test_integers_are_no_parameters():
    base = {"w": torch.zeros(100), "positions": torch.arange(50)}
    tuned = {"w": torch.arange(100.0), "positions": torch.arange(50) + 1}
    found = find_core(base, tuned, 0.1)
    assert set(found.shapes) == {"w"} and int(bools(found).sum()) == 10


@pytest.fixture
def files(tmp_path):
    base = make_model(0, SHAPES)
    tuned = make_model(1, SHAPES, around=base)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path, base, tuned


def tied(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a state dict has tied embeddings: one tensor under two names."""
    return {**model, "head": model["w"]}


def test_a_tied_tensor_of_a_state_dict_is_one():
    base = make_model(0, SHAPES, torch.float32)
    tuned = make_model(1, SHAPES, torch.float32, base)
    found, wanted = find_core(tied(base), tied(tuned), 0.1), find_core(base, tuned, 0.1)
    assert found.shapes == wanted.shapes and np.array_equal(bools(found), bools(wanted))
    params = {name: torch.nn.Parameter(value.clone()) for name, value in base.items()}
    assert freeze(MaskedEMAAdamW(params.items(), isolation_ratio=0), [found]) == bools(wanted).sum()
    fused, report = fuse(tied(base), [tied(tuned)], [found])
    assert fused.keys() == {*base, "head"} and fused["head"] is fused["w"]
    assert torch.equal(fused["w"], fuse(base, [tuned], [wanted])[0]["w"])
    assert report.elements == sum(value.numel() for value in base.values())


def test_what_holds_no_weights_is_named():
    model = torch.nn.Linear(2, 2)
    for wrong in (model, model.named_parameters()):
        with pytest.raises(TypeError, match=rf"model\.state_dict\(\)\), not {type(wrong).__name__}"):
            find_core(dict(model.named_parameters()), wrong)


def test_a_file_holds_the_same_core(files, monkeypatch):
    folder, base, tuned = files
    monkeypatch.setattr(checkpoints, "SLICE", 64)
    path = folder / "core.safetensors"
    seen = []
    summary = save_core(folder / "base.safetensors", folder / "tuned.safetensors", path, 0.03, seen.append)
    expected = oracle.core(base, tuned, 0.03)
    found = CoreFile(path)
    memory = find_core(base, tuned, 0.03)
    for name in SHAPES:
        assert torch.equal(union_mask([found], name), union_mask([memory], name)), name
    assert summary.elements == expected.size and summary.selected == expected.sum()
    assert summary.k == math.floor(0.03 * expected.size) and summary.ties == summary.selected - summary.k
    moved = np.abs(oracle.flat(tuned).astype(np.float32) - oracle.flat(base).astype(np.float32))
    assert summary.threshold == np.sort(moved)[::-1][summary.k - 1]
    assert sum(seen) == core.PASSES * expected.size
    # The layout that other programs read: safetensors, packed as save_isolation's masks.
    stored = load_file(path)
    parameters = json.loads(found.metadata["parameters"])
    at = 0
    for name, shape in SHAPES.items():
        n = math.prod(shape)
        assert parameters[name] == {"shape": list(shape)}
        assert torch.equal(stored[f"isolation_mask/{name}"], pack(torch.from_numpy(expected[at : at + n])))
        at += n
    assert found.metadata["base"] == "base.safetensors" and found.metadata["ratio"] == "0.03"
    again = folder / "again.safetensors"
    save_core(folder / "base.safetensors", folder / "tuned.safetensors", again, 0.03)
    assert again.read_bytes() == path.read_bytes()


def test_masks_of_save_isolation_are_cores_too(tmp_path):
    params = {"a": torch.nn.Parameter(torch.ones(5, 3)), "b": torch.nn.Parameter(torch.ones(9))}
    optimizer = MaskedEMAAdamW(list(params.items()), mask_interval=None)
    mask = torch.arange(15).view(5, 3) % 2 == 0
    optimizer.set_isolation_mask(params["a"], mask)
    save_isolation(optimizer, tmp_path / "masks.safetensors")
    found = CoreFile(tmp_path / "masks.safetensors")
    assert torch.equal(union_mask([found], "a"), mask) and not union_mask([found], "b").any()


def test_nothing_is_written_for_bad_input(files):
    folder, base, _ = files
    out = folder / "core.safetensors"
    out.write_bytes(b"precious")

    def refused(match, tuned, ratio=0.01):
        with pytest.raises(IsolationError, match=match):
            save_core(folder / "base.safetensors", tuned, out, ratio)
        assert out.read_bytes() == b"precious"
        assert {path.name for path in folder.iterdir()} == {
            "base.safetensors",
            "tuned.safetensors",
            "core.safetensors",
        }

    refused("w is missing", {name: one for name, one in base.items() if name != "w"})
    refused("extra is not in .*base.safetensors", base | {"extra": torch.ones(3)})
    refused(r"b is \[8\], in .* \[7\]", base | {"b": torch.ones(8)})
    for bad in (math.nan, math.inf):
        refused(
            "w minus .* is not finite", base | {"w": base["w"].clone().index_fill_(0, torch.tensor([3]), bad)}
        )
    refused(r"ratio is 1.0; allowed: 0 or more and less than 1", base, 1.0)
    refused("ratio is -0.1", base, -0.1)
    with pytest.raises(IsolationError, match="quantised weights cannot be compared"):
        find_core({"b": torch.ones(7).to(torch.float8_e5m2)}, {"b": torch.ones(7).to(torch.float8_e5m2)})
    with pytest.raises(IsolationError, match="no such file"):
        save_core(folder / "nowhere", base, out)


def test_damaged_files_are_named(files):
    folder, _, _ = files
    path = folder / "core.safetensors"
    save_core(folder / "base.safetensors", folder / "tuned.safetensors", path, 0.1)
    tensors, metadata = load_file(path), CoreFile(path).metadata
    whole = path.read_bytes()

    path.write_bytes(whole[:-5])
    with pytest.raises(IsolationError, match="not a whole safetensors file"):
        CoreFile(path)
    with pytest.raises(IsolationError, match="not a core region"):
        CoreFile(folder / "base.safetensors")
    save_file(tensors, path, metadata | {"version": "7"})
    with pytest.raises(IsolationError, match="version '7'; this release reads '1'"):
        CoreFile(path)
    save_file(tensors, path, metadata | {"parameters": "{"})
    with pytest.raises(IsolationError, match="damaged"):
        CoreFile(path)
    save_file(tensors | {"isolation_mask/b": torch.zeros(2, dtype=torch.uint8)}, path, metadata)
    with pytest.raises(IsolationError, match=r"mask of b is U8 \[2\], not U8 \[1\]"):
        CoreFile(path)
    save_file(tensors | {"isolation_mask/b": torch.full((1,), 0x80, dtype=torch.uint8)}, path, metadata)
    with pytest.raises(IsolationError, match="padding bits of the mask of b"):
        CoreFile(path)
    save_file(tensors | {"isolation_mask/x": torch.zeros(1, dtype=torch.uint8)}, path, metadata)
    with pytest.raises(IsolationError, match="a mask of x, which has no shape"):
        CoreFile(path)


def test_from_bools_packs():
    masks = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    found = MemoryCore.from_bools(masks)
    assert all(torch.equal(union_mask([found], name), mask) for name, mask in masks.items())


def test_torchs_defaults_change_nothing():
    base = make_model(0, SHAPES)
    tuned = make_model(1, SHAPES, around=base)
    expected = bools(find_core(base, tuned, 0.05))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = find_core(base, tuned, 0.05)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(bools(found), expected)


def test_the_numbers_of_a_core_that_is_all_that_moved(tmp_path):
    base = {"w": torch.zeros(100)}
    tuned = {"w": torch.tensor([0.0] * 96 + [3.0, -2.0, 4.0, 0.5])}
    summary = save_core(base, tuned, tmp_path / "core", 0.1)
    assert (summary.k, summary.selected, summary.ties, summary.threshold) == (10, 4, 0, 0.5)
    assert bools(CoreFile(tmp_path / "core")).nonzero()[0].tolist() == [96, 97, 98, 99]
    summary = save_core(base, base, tmp_path / "core", 0.1)
    assert (summary.k, summary.selected, summary.ties, summary.threshold) == (10, 0, 0, math.inf)


def test_the_largest_finite_distance_counts():
    largest = torch.finfo(torch.float32).max
    base, tuned = {"w": torch.zeros(10)}, {"w": torch.tensor([largest, -largest, *([1.0] * 8)])}
    assert bools(find_core(base, tuned, 0.2)).nonzero()[0].tolist() == [0, 1]
