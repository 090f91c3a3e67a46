"""isolation_granularity: no state for rows and blocks that are isolated persistently, and all else as the contract has it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from epi_kernels import MaskedEMAAdamW, enable_gradient_release
from epi_kernels.optim.compact import RUNS_KEY
from epi_kernels.optim.layers import find_layers
from epi_kernels.optim.refresh import StatsByDevice, partition
from epi_kernels.reference import bits
from epi_kernels.reference.runs import find_runs
from python_tests.harness import TARGETS, Target, assert_same_run, give_gradients, snapshot
from python_tests.row_runs import ROUNDS, SHAPES, begun, fresh, go_on, masks, model, row_pair, stateless

KINDS = ["normal", "sparse", "ties", "small"]


def test_a_run_by_rows_is_the_oracle_s(target: Target):
    """Moments of what has no state are 0: in N, in the statistics and in the threshold; every backend, refreshes included.

    Of the interpreter, which takes seconds a refresh, one case: with scales, corrections and random bits."""
    for name in ["8 bits"] if target.interpreted else ROUNDS:
        pair = row_pair(target, isolation_ratio=0.1, mask_interval=2, **ROUNDS[name])
        for kind in KINDS[: 1 if target.interpreted else 4]:
            pair.step(pair.gradients([kind] * len(SHAPES)))
            pair.check()


@pytest.mark.parametrize("normalization", ["none", "zscore"])
def test_normalizations(normalization: str):
    pair = row_pair(Target("reference"), normalization=normalization, mask_interval=2, isolation_ratio=0.1)
    pair.step(pair.gradients(["normal"] * len(SHAPES)))
    assert pair.optimizer.isolation_report().isolated > sum(int(mask.sum()) for mask in masks().values())
    if normalization == "none":
        pair.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_what_can_move_takes_the_steps_of_an_element_wise_run(dtype: torch.dtype, state_dtype: str | None):
    """Nothing is selected, so that nothing depends on u: weights and moments have the same bits, random ones included."""
    options = {"isolation_ratio": 0.0, "state_dtype": state_dtype, "dtype": dtype}
    (one, by_row), (other, by_element) = begun("row", **options), begun("element", **options)
    for name in SHAPES:
        assert torch.equal(one[name], other[name]), name
    rows, elements = by_row.state_dict()["state"], by_element.state_dict()["state"]
    for number, (name, mask) in enumerate(masks().items()):
        kept = ~torch.from_numpy(stateless(mask.numpy())).view(mask.shape)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(rows[number][key][kept], elements[number][key][kept]), (name, key)
            assert not rows[number][key][~kept].any() and elements[number][key][~kept].any()
        for key in ("step", "isolation_mask", "persistent_mask"):
            assert torch.equal(rows[number][key], elements[number][key]), (name, key)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_what_has_no_state_are_not_read(backend: str):
    """They may be anything: no statistic, no count of non-finite importances and no weight tells."""
    runs = []
    for poison in (False, True):
        params, optimizer = begun(backend=backend, steps=1)
        for number in range(1, 5):
            give_gradients(params, number)
            for name, mask in masks().items() if poison else ():
                params[name].grad.view(-1)[torch.from_numpy(stateless(mask.numpy()))] = torch.nan
            optimizer.step()
        assert optimizer.isolation_report().nonfinite == 0
        runs.append(optimizer)
    assert_same_run(*runs)


def test_without_persistent_masks_every_granularity_is_the_same():
    runs = []
    for granularity in ("element", "row", "block"):
        params = model()
        optimizer = fresh(params, granularity)
        go_on(params, optimizer, range(5))
        runs.append(optimizer)
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


def test_state_is_as_small_as_what_moves():
    """Exactly: runs of blocks that hold a movable element, at 16 bytes a run, and no persistent mask where rows are blocks."""
    params = {"w": torch.nn.Parameter(torch.ones(100, 128))}
    optimizer = fresh(params, state_dtype="int8")
    mask = torch.zeros(100, 128, dtype=torch.bool)
    mask[10:100] = True
    optimizer.set_isolation_mask(params["w"], mask, persistent=True)
    go_on(params, optimizer, range(3))
    n = 10 * 128
    assert optimizer.state_bytes() == {
        "exp_avg": n + n // 64,
        "exp_avg_sq": n + n // 64,
        "importance": 0,
        "isolation_mask": n // 8,
        "persistent_mask": 2 * 16,
        "other": 4,
        "total": 2 * (n + n // 64) + n // 8 + 32 + 4,
    }
    assert torch.equal(optimizer.isolation_mask(params["w"])[10:], mask[10:])


def test_blocks_are_4096_neighbours_whatever_the_rows():
    params = {"w": torch.nn.Parameter(torch.ones(100, 128))}
    optimizer = fresh(params, "block")
    mask = torch.zeros(12800, dtype=torch.bool)
    mask[4096:8192] = mask[12288:] = True
    optimizer.set_isolation_mask(params["w"], mask.view(100, 128), persistent=True)
    assert optimizer.state[params["w"]]["exp_avg"].numel() == 2 * 4096
    before = params["w"].detach().clone()
    go_on(params, optimizer, range(3))
    assert torch.equal((params["w"] == before).view(-1)[mask], torch.ones(4096 + 512, dtype=torch.bool))
    assert (params["w"] != before).view(-1)[~mask].any()


def test_masks_that_leave_too_little_out_stay_element_wise():
    """Every other row of 64: a run a row would cost more than it saves."""
    params = {"w": torch.nn.Parameter(torch.ones(64, 64))}
    optimizer = fresh(params)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[::2] = True
    optimizer.set_isolation_mask(params["w"], mask, persistent=True)
    assert RUNS_KEY not in optimizer.state[params["w"]]
    assert optimizer.state[params["w"]]["exp_avg"].shape == (64, 64)


@pytest.mark.parametrize("n", [1, 7, 63, 64, 65, 127, 128, 1000])
def test_runs_are_the_blocks_with_anything_movable(n: int):
    rng = np.random.default_rng(n)
    for share in (0.0, 0.9, 0.999, 1.0):
        mask = np.repeat(rng.random(n // 16 + 1) < share, 16)[:n]
        found = np.ones(n, dtype=bool)
        runs = find_runs(bits.pack(torch.from_numpy(mask)), n)
        for start, count in runs:
            assert start % 64 == 0 and count > 0 and (count % 64 == 0 or start + count == n)
            found[start : start + count] = False
        assert np.array_equal(found, stateless(mask))
        assert (np.diff(runs[:, 0]) > runs[:-1, 1]).all(), "neighbouring runs are one"


def test_a_mask_that_changes_keeps_what_keeps_state():
    """Released rows begin with zeros at their parameter's step; those that go lose theirs; the rest stays as it is."""
    params, optimizer = begun(isolation_ratio=0.0)
    w, old = params["w"], masks()["w"]
    before = optimizer.state_dict()["state"][0]
    new = torch.zeros_like(old)
    new[20:45] = True
    optimizer.set_isolation_mask(w, new, persistent=True)
    after = optimizer.state_dict()["state"][0]
    gone, came = (torch.from_numpy(stateless(mask.numpy())).view(mask.shape) for mask in (new, old))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][~gone], before[key][~gone]) and not before[key][came].any()
        assert not after[key][gone].any() and before[key][gone & ~came].any()
    assert after["step"] == before["step"] == 5
    frozen = w.detach().clone()
    go_on(params, optimizer, range(5, 7))
    assert torch.equal(w == frozen, new)
    optimizer.set_isolation_mask(w, torch.zeros_like(new), persistent=True)
    assert RUNS_KEY not in optimizer.state[w] and optimizer.state[w]["exp_avg"].shape == w.shape
    assert not optimizer.isolation_mask(w).any()
    go_on(params, optimizer, range(7, 8))
    assert not (w == frozen).any()


def test_masks_by_hand_lie_beside_persistent_rows():
    params, optimizer = begun(mask_interval=None)
    w, rows = params["w"], masks()["w"]
    given = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    optimizer.set_isolation_mask(w, given)
    assert torch.equal(optimizer.isolation_mask(w), given | rows) and RUNS_KEY in optimizer.state[w]
    frozen = w.detach().clone()
    go_on(params, optimizer, range(5, 8))
    assert torch.equal(w == frozen, given | rows)


def test_an_importance_of_its_own_may_come_later():
    params, optimizer = begun()
    for group in optimizer.param_groups:
        group["importance_beta"] = 0.9
    go_on(params, optimizer, range(5, 8))
    state = optimizer.state[params["w"]]
    assert state["importance"].shape == state["exp_avg"].shape and state["importance"].any()


def test_gradient_release_gives_the_same_bits():
    runs = []
    for released in (False, True):
        params, optimizer = begun(normalization="zscore")
        net = torch.nn.Module()
        for name, param in params.items():
            net.register_parameter(name, param)
        handle = enable_gradient_release(net, optimizer) if released else None
        for _ in range(3):
            sum((param * param).sum() for param in params.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle is None or not handle.is_open
        runs.append(optimizer)
    assert_same_run(*runs)


def test_sums_of_a_refresh_are_those_of_a_step():
    """Bit by bit, run by run: a parameter that is released in the backward pass has its sums taken apart from its step."""
    params, optimizer = begun(normalization="zscore", mask_interval=None, steps=1)
    entries, config = list(optimizer._parameters()), optimizer._config
    table = find_layers(entries, config, None, 1, torch.device("cpu"))
    in_step, alone = StatsByDevice(len(table.names), config), StatsByDevice(len(table.names), config)
    give_gradients(params, 1)
    grads = [param.grad for param in params.values()]
    optimizer._plan.run(grads, grad_scale=None, found_inf=None, layers=table, stats=in_step)
    (part,) = partition(entries, optimizer.state, table, set(), config)[0]
    part.backend.accumulate(part.stats_pending, alone.on(part.device))
    one, other = (stats.on(part.device).moments for stats in (in_step, alone))
    assert one[: len(masks()) - 1].all() and torch.equal(one, other)


@pytest.mark.parametrize(
    "target", [one for one in TARGETS if one.backend == "triton"], indirect=True, ids=str
)
def test_every_run_counts_its_steps_apart(target: Target):
    """More runs than a program of the kernel that adds one to each row's ``step``."""
    p = torch.nn.Parameter(torch.ones(8 * 140, 64, device=target.device))
    optimizer = fresh({"w": p}, backend=target.backend, isolation_ratio=0.0)
    mask = torch.ones_like(p, dtype=torch.bool)
    mask[::8] = False
    optimizer.set_isolation_mask(p, mask, persistent=True)
    assert len(optimizer.state[p][RUNS_KEY]) == 141
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert len(p.detach()[::8].unique()) == 1 and torch.equal(p == 1, mask)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_loss_scale_is_divided_out_where_the_step_reads(backend: str):
    """The gradient of what has no state is not read, and stays scaled; a step with found_inf is none."""
    results = []
    for scale in (None, 8.0):
        params, optimizer = begun(backend=backend)
        for found_inf in (0.0, 1.0, 0.0):
            give_gradients(params, int(found_inf) + 10)
            if scale is not None:
                for param in params.values():
                    param.grad *= scale
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
            if scale is not None or not found_inf:
                optimizer.step()
        results.append((params, params["w"].grad.clone()))
    for name in SHAPES:
        assert torch.equal(results[0][0][name], results[1][0][name]), name
    none = torch.from_numpy(stateless(masks()["w"].numpy())).view(64, 96)
    assert torch.equal(results[1][1], torch.where(none, 8.0 * results[0][1], results[0][1]))


def test_float64_on_the_reference():
    params, optimizer = begun(dtype=torch.float64, backend="reference")
    frozen = {name: param.detach().clone() for name, param in params.items()}
    go_on(params, optimizer, range(5, 7))
    for name, mask in masks().items():
        assert torch.equal(params[name][mask], frozen[name][mask])


def test_a_copy_goes_on_alike():
    params, optimizer = begun()
    copied_params, copied = copy.deepcopy((params, optimizer))
    assert RUNS_KEY in copied.state[copied_params["w"]]
    for pair in ((params, optimizer), (copied_params, copied)):
        go_on(*pair, range(5, 8))
    assert_same_run(copied, optimizer)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "unit"), [("row", "rows"), ("block", "blocks of 4,096")])
def test_parts_of_rows_and_blocks_are_refused(granularity: str, unit: str):
    params, optimizer = begun("element")
    state = optimizer.state_dict()
    params = model()
    optimizer = fresh(params, granularity)
    go_on(params, optimizer, range(2))
    before = snapshot(optimizer)
    mask = torch.zeros(SHAPES["w"], dtype=torch.bool)
    mask[3:60, :90] = True
    with pytest.raises(ValueError, match=f"w: a persistent mask .* is of whole {unit}"):
        optimizer.set_isolation_mask(params["w"], mask, persistent=True)
    state["state"][0]["persistent_mask"] = bits.pack(mask)
    with pytest.raises(ValueError, match=f"state of w: a persistent mask .* is of whole {unit}"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before
    optimizer.set_isolation_mask(params["w"], mask)  # until the next refresh, element by element
    assert torch.equal(optimizer.isolation_mask(params["w"]), mask)


def test_arguments():
    params = list(model().values())
    with pytest.raises(ValueError, match="isolation_granularity must be one of 'element', 'row', 'block'"):
        MaskedEMAAdamW(params, isolation_granularity="column")
    with pytest.raises(ValueError, match="isolation_granularity must be 'element' with capturable=True"):
        MaskedEMAAdamW(params, isolation_granularity="row", capturable=True)
    for other in ({"offload": "cpu"}, {"state_dtype": "int4"}):
        with pytest.raises(
            ValueError, match="isolation_granularity must be 'element' .* with offload='cpu' and"
        ):
            MaskedEMAAdamW(params, isolation_granularity="row", **other)
    with pytest.raises(ValueError, match="isolation_granularity cannot be set per param group"):
        MaskedEMAAdamW([{"params": params, "isolation_granularity": "row"}])


def test_a_parameter_resized_after_the_masks_is_refused():
    params, optimizer = begun()
    w = params["w"]
    w.data = torch.zeros(70, 96)
    w.grad = torch.zeros(70, 96)
    with pytest.raises(RuntimeError, match="the state 'exp_avg' of w .* does not fit"):
        optimizer.step()
