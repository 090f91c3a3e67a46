"""How the CUDA backend divides work among programs: every element once, every partial in its place."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from epi_kernels.backends import cuda, table
from epi_kernels.backends.cuda import CHUNK, plan

SIZES = {
    "nothing": [],
    "empties": [0, 0],
    "one": [1],
    "chunk": [CHUNK - 1, CHUNK, CHUNK + 1],
    "mixed": [0, 5, 3 * CHUNK + 7, 0, 1, CHUNK, 9 * CHUNK, 2, 0],
    "many": [7] * 40,
    "large": [10 * CHUNK, 50_000_000],
}
LAYERS = {
    "own": lambda n: np.arange(n),
    "one": lambda n: np.zeros(n, np.int64),
    "mod": lambda n: np.arange(n) % 3 - 1,
}


def spans_of(layout: cuda.Layout, numel: np.ndarray) -> list[list[tuple[int, int, int]]]:
    """(row, begin, end) of each program, walked as csrc/cuda/spans.h does."""
    programs = []
    for (row, begin), (last_row, last_end) in zip(layout.programs[:-1], layout.programs[1:]):
        spans = []
        while row < last_row or (row == last_row and begin < last_end):
            end = last_end if row == last_row else numel[row]
            spans.append((int(row), int(begin), int(end)))
            row, begin = row + 1, 0
        programs.append(spans)
    return programs


@pytest.mark.parametrize("max_programs", [1, 3, 8192])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_element_once_and_every_partial_written(sizes, layers, max_programs, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_PROGRAMS", max_programs)
    numel = np.array(SIZES[sizes], dtype=np.int64)
    layer = LAYERS[layers](len(numel)).astype(np.int64)
    layout = plan(numel, layer)
    assert layout.programs.dtype == layout.runs.dtype == layout.run_slots.dtype == np.int64
    assert sorted(layout.order.tolist()) == np.flatnonzero(numel).tolist()
    ordered, ordered_layers = numel[layout.order], layer[layout.order]
    assert (np.diff(ordered_layers) >= 0).all()

    programs = spans_of(layout, ordered)
    covered = [span for spans in programs for span in spans]
    assert all(spans for spans in programs), "a program without work"
    assert all(begin % CHUNK == 0 and end > begin for _, begin, end in covered)
    position = 0
    for row in range(len(ordered)):
        ends = [(b, e) for r, b, e in covered if r == row]
        assert ends[0][0] == 0 and ends[-1][1] == ordered[row]
        assert all(before[1] == after[0] for before, after in zip(ends, ends[1:]))
        position += len(ends)
    assert position == len(covered)

    # programs differ by one chunk at most
    loads = [sum(-(-(end - begin) // CHUNK) for _, begin, end in spans) for spans in programs]
    assert not loads or max(loads) - min(loads) <= 1

    written = {}
    for program, spans in enumerate(programs):
        for row, _, _ in spans:
            run = int(layout.runs[row])
            written.setdefault(program + run, set()).add((run, int(ordered_layers[row])))
    assert all(len(owners) == 1 for owners in written.values()), "two runs share a slot"
    read = {}
    for run, (run_layer, first, stop) in enumerate(layout.run_slots.tolist()):
        for slot in range(first, stop):
            assert slot not in read
            read[slot] = {(run, run_layer)}
    assert read == written
    assert all(slot < layout.n_partials for slot in read)


def test_programs_and_partials_stay_bounded():
    """Nothing that a refresh allocates grows with the parameters."""
    layout = plan(np.array([10**9], dtype=np.int64), np.zeros(1, np.int64))
    assert layout.n_programs == cuda.MAX_PROGRAMS
    assert layout.n_partials * cuda.STATS_PARTIAL_WORDS * 8 < 300 * 1024
    # ... up to the sizes where a program's elements would no longer fit 32 bits
    layout = plan(np.array([2**44], dtype=np.int64), np.zeros(1, np.int64))
    assert (np.diff(layout.programs[:, 1])[:-1] < 2**31).all()


def test_plans_are_kept_and_forgotten():
    plans = cuda.Plans(size=2)
    sizes = [np.array([n], dtype=np.int64) for n in (1, 2, 3)]
    layer = np.zeros(1, np.int64)
    first = plans.get(sizes[0], layer)
    assert plans.get(sizes[0], layer) is first
    plans.get(sizes[1], layer), plans.get(sizes[2], layer)
    assert plans.get(sizes[0], layer) is not first


@pytest.mark.parametrize("offset", [0, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "column", [table.PARAM, table.GRAD, table.EXP_AVG, table.EXP_AVG_SQ, table.IMPORTANCE]
)
def test_one_unaligned_tensor_sends_its_row_down_the_narrow_path(offset, column):
    rows = np.zeros((2, table.COLUMNS), dtype=np.int64)
    rows[:, [table.PARAM, table.GRAD, table.EXP_AVG, table.EXP_AVG_SQ]] = 4096
    rows[1, column] = 4096 + offset
    rows[:, table.NUMEL] = 3  # no pointer: must not count
    pointers = [table.PARAM, table.GRAD, table.EXP_AVG, table.EXP_AVG_SQ, table.IMPORTANCE]
    assert cuda.aligned(rows, pointers).tolist() == [True, offset % 16 == 0]


def test_constants_are_those_of_the_kernels():
    text = (cuda.Path(__file__).parents[1] / "csrc" / "cuda" / "table.h").read_text()
    assert f"kChunk = {CHUNK};" in text and f"kAligned = {cuda.ALIGNED}," in text
    columns = text.split("enum Column {")[1].split("}")[0].replace("\n", "").replace(" ", "").split(",")
    names = [name for name in columns if name and name != "kColumns"]
    snake = ["".join("_" + c if c.isupper() else c.upper() for c in name[1:]).lstrip("_") for name in names]
    assert [getattr(table, name) for name in snake] == list(range(table.COLUMNS))


# --- whether it can run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "device", "expected"),
    [
        ({}, False, "the extension is not built"),
        ({"reason": "not built: nvcc was not found"}, False, "not built: nvcc was not found"),
        ({"reason": "built with nvcc 13.0 for torch's CUDA 13.0"}, True, "does not load"),
    ],
)
def test_a_library_that_is_missing_says_why(record, device, expected, monkeypatch):
    monkeypatch.setattr(cuda, "_build_record", lambda: record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setitem(sys.modules, "epi_kernels._C_cuda", None)
    with pytest.raises(ImportError, match=expected):
        cuda.CudaBackend()


def test_a_built_library_without_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "epi_kernels._C_cuda", types.ModuleType("_C_cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="no CUDA device"):
        cuda.CudaBackend()


def test_what_it_refuses(monkeypatch):
    monkeypatch.setitem(sys.modules, "epi_kernels._C_cuda", types.ModuleType("_C_cuda"))
    monkeypatch.setattr(cuda, "cuda_operators", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    backend, device = cuda.CudaBackend(), torch.device("cuda", 0)
    assert backend.refuses(device, torch.float32) is None is backend.refuses(device, torch.bfloat16)
    assert "float64" in backend.refuses(device, torch.float64)
    assert "not on cpu" in backend.refuses(torch.device("cpu"), torch.float32)
    capability[:] = 7, 0
    assert "7.5" in backend.refuses(device, torch.float32)
