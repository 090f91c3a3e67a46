"""Overlap, grouping, orders and stages against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epi_kernels.isolation import (
    CoreFile,
    IsolationError,
    MemoryCore,
    Stage,
    core_file,
    group_tasks,
    jaccard_matrix,
    order_groups,
    plan_stages,
    sample_stage,
    save_core,
)
from epi_kernels.isolation.overlap import popcount
from epi_kernels.isolation.staging import ORDERS
from python_tests import oracle_isolation as oracle

SIZES = (9, 0, 64, 130)


def random_cores(tasks: int, seed: int) -> tuple[list[MemoryCore], list[np.ndarray]]:
    """Of densities from none to nearly all."""
    rng = np.random.default_rng(seed)
    cores, vectors = [], []
    for _ in range(tasks):
        density = rng.choice([0.0, 0.05, 0.5, 0.95])
        parts = [rng.random(n) < density for n in SIZES]
        vectors.append(np.concatenate(parts))
        cores.append(MemoryCore.from_bools({f"t{i}": torch.from_numpy(part) for i, part in enumerate(parts)}))
    return cores, vectors


def test_popcount_of_every_byte():
    every = torch.arange(256).to(torch.uint8)
    assert [popcount(every[i : i + 1]) for i in range(256)] == [bin(i).count("1") for i in range(256)]
    assert popcount(every) == 1024 and popcount(every[:0]) == 0


@given(st.integers(0, 5), st.integers(0, 10_000))
def test_similarities_are_those_of_sets(tasks, seed):
    cores, vectors = random_cores(tasks, seed)
    assert jaccard_matrix(cores) == [[oracle.jaccard(a, b) for b in vectors] for a in vectors]


def test_masks_are_counted_slice_by_slice(monkeypatch):
    monkeypatch.setattr(core_file, "SLICE", 8)
    cores, vectors = random_cores(3, 5)
    assert jaccard_matrix(cores)[2][0] == oracle.jaccard(vectors[2], vectors[0])


def test_files_of_cores_serve_as_what_is_read_of_them(tmp_path):
    rng, paths = torch.Generator().manual_seed(0), []
    base = {"w": torch.zeros(40)}
    for task in range(3):
        paths.append(tmp_path / f"{task}.core")
        save_core(base, {"w": torch.randn(40, generator=rng)}, paths[-1], 0.1 * (3 - task))
    cores = [CoreFile(path) for path in paths]
    assert jaccard_matrix(paths) == jaccard_matrix(cores)
    groups = [[0], [1], [2]]
    assert order_groups(groups, "frozen", cores=paths) == order_groups(groups, "frozen", cores=cores)


def test_cores_of_different_models_are_refused():
    cores = [MemoryCore.from_bools({"w": torch.zeros(n, dtype=torch.bool)}, f"core {n}") for n in (3, 4)]
    for call in (jaccard_matrix, lambda cores: order_groups([[0], [1]], "frozen", cores=cores)):
        with pytest.raises(IsolationError, match=r"core 4: of another architecture than core 3: w is \[4\]"):
            call(cores)


@given(st.integers(0, 7), st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
def test_groups_are_the_connected_components(tasks, seed, tau):
    rng = np.random.default_rng(seed)
    similarity = np.round(rng.random((tasks, tasks)) ** 3, 1)
    similarity = np.maximum(similarity, similarity.T)
    np.fill_diagonal(similarity, 1.0)
    groups = group_tasks(similarity.tolist(), tau)
    assert groups == oracle.components(similarity, tau)


def test_a_chain_joins_what_is_not_alike_itself():
    chain = [[1, 0.1, 0], [0.1, 1, 0.1], [0, 0.1, 1]]
    assert group_tasks(chain, 0.1) == [[0, 1, 2]]  # meets or exceeds
    assert group_tasks(chain, 0.11) == [[0], [1], [2]]


def test_tau_zero_is_one_group():
    assert group_tasks(np.eye(5).tolist(), 0.0) == [[0, 1, 2, 3, 4]]
    for tau in (-0.1, 1.1, math.nan):
        with pytest.raises(IsolationError, match="allowed: 0 to 1"):
            group_tasks([[1.0]], tau)
    with pytest.raises(IsolationError, match="square"):
        group_tasks([[1.0, 0.0]])


@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from(ORDERS))
def test_every_order_keeps_every_group(tasks, seed, order):
    rng = np.random.default_rng(seed)
    cores, vectors = random_cores(tasks, seed)
    labels = rng.integers(0, tasks, tasks)
    groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    difficulty = rng.random(tasks).tolist()
    ordered = order_groups(groups, order, seed=seed, cores=cores, difficulty=difficulty)
    assert sorted(ordered) == sorted(groups)
    lengths = [len(group) for group in ordered]
    if order == "smallest":
        assert lengths == sorted(lengths)
    if order == "largest":
        assert lengths == sorted(lengths, reverse=True)
    if order == "curriculum":
        means = [np.mean([difficulty[task] for task in group]) for group in ordered]
        assert np.all(np.diff(means) >= -1e-12)
    if order == "frozen":
        assert ordered == oracle.smallest_frozen(groups, vectors)


def test_what_is_frozen_already_costs_nothing():
    sets = [range(10, 14), range(5), range(3)]
    cores = [MemoryCore.from_bools({"w": torch.tensor([i in one for i in range(20)])}) for one in sets]
    # After 2 (three elements), 1 adds two though it is the larger one, 0 four.
    assert order_groups([[0], [1], [2]], "frozen", cores=cores) == [[2], [1], [0]]


def test_the_random_order_is_its_seeds():
    groups = [[i] for i in range(6)]
    drawn = {str(order_groups(groups, "random", seed=seed)) for seed in range(20)}
    assert len(drawn) > 10
    assert order_groups(groups, "random", seed=3) == order_groups(groups, "random", seed=3)


def test_orders_ask_for_what_they_need():
    with pytest.raises(IsolationError, match="order is 'best'; allowed: random, smallest"):
        order_groups([[0]], "best")
    with pytest.raises(IsolationError, match="needs the cores of all 2 tasks"):
        order_groups([[0], [1]], "frozen")
    for difficulty in (None, [1.0], [1.0, math.nan]):
        with pytest.raises(IsolationError, match="a number, for each of 2 tasks"):
            order_groups([[0], [1]], "curriculum", difficulty=difficulty)


def test_stages_in_both_readings():
    groups = [[2], [0, 3], [1]]
    assert plan_stages(groups) == [Stage((2,), ()), Stage((0, 3), (2,)), Stage((1,), (2, 0, 3))]
    everyone = (2, 0, 3, 1)
    assert plan_stages(groups, "all") == [Stage(tuple(group), everyone) for group in groups]
    assert plan_stages(groups, "all", single_stage=True) == [Stage(everyone, everyone)]
    with pytest.raises(IsolationError, match="no earlier groups"):
        plan_stages(groups, single_stage=True)
    with pytest.raises(IsolationError, match="allowed: earlier, all"):
        plan_stages(groups, "some")
    with pytest.raises(IsolationError, match="in two groups"):
        plan_stages([[0], [1, 0]])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 99))
def test_a_stage_samples_its_tasks_alike(sizes, share, seed):
    datasets = [[(task, i) for i in range(n)] for task, n in enumerate(sizes)]
    tasks = list(range(len(sizes)))
    chosen = sample_stage(datasets, tasks, share, seed)
    assert len(set(chosen)) == len(chosen)
    each = max(1, round(share * sum(sizes) / len(sizes)))
    assert [sum(task == t for t, _ in chosen) for task in tasks] == [min(each, n) for n in sizes]
    assert chosen == sample_stage(datasets, tasks, share, seed)


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=5), st.floats(0.01, 1), st.integers(0, 99), st.data()
)
def test_whatever_the_stages_they_learn_from_the_same_samples(sizes, share, seed, data):
    """Section 5: multi- and single-stage consolidation "utilize identical sampled datasets"."""
    datasets = [[(task, i) for i in range(n)] for task, n in enumerate(sizes)]
    order = data.draw(st.permutations(range(len(sizes))))
    cut = data.draw(st.integers(1, len(sizes) - 1))
    in_stages = [
        one for stage in (order[:cut], order[cut:]) for one in sample_stage(datasets, stage, share, seed)
    ]
    assert sorted(in_stages) == sorted(sample_stage(datasets, order, share, seed))
    by_position = dict(enumerate(datasets))
    assert sample_stage(by_position, order, share, seed) == sample_stage(datasets, order, share, seed)


def test_a_stage_without_data_is_refused():
    for datasets, tasks in (([[]], [0]), ([[1]], [])):
        with pytest.raises(IsolationError, match="needs data"):
            sample_stage(datasets, tasks, 0.5, 0)
    with pytest.raises(IsolationError, match="share is 0"):
        sample_stage([[1]], [0], 0, 0)
