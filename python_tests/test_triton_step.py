"""The Triton step, with the stats inside it, gives the reference's bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from epi_kernels import MaskedEMAAdamW
from epi_kernels.reference.stats import LayerStats
from python_tests.harness import need_triton
from python_tests.stage_checks import run_step
from python_tests.triton_stages import (
    BF16,
    BLOCK,
    CHUNK,
    DEVICE,
    F32,
    REFERENCE,
    Spec,
    assert_same,
    backend,
    make,
    on_device,
    same_bits,
    stats_on_device,
)

need_triton()

DTYPES = list(itertools.product((F32, BF16), (F32, BF16), (None, F32, BF16)))
SIZES = (0, 1, 7, BLOCK // 2 - 1, BLOCK // 2, BLOCK // 2 + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * CHUNK + 13)


def check(*specs: Spec, steps: int = 1, stats: LayerStats | None = None, edit=None, **options) -> None:
    expected = make(*specs)
    if edit is not None:
        edit(expected)
    actual = on_device(expected, specs)
    moved = None if stats is None else stats_on_device(stats)
    for _ in range(steps):
        run_step(REFERENCE, expected, stats=stats, **options)
        run_step(backend(), actual, stats=moved, **options)
    assert_same(actual, expected)
    if stats is not None:
        for name in ("minimum", "maximum", "nonfinite"):
            same_bits(getattr(moved, name), getattr(stats, name), name)
        # sums in another order: the last bits may differ
        torch.testing.assert_close(moved.moments.cpu(), stats.moments, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_every_combination_of_dtypes_in_one_call(stochastic_rounding):
    specs = [Spec(CHUNK + 9, *dtypes, layer=i % 3) for i, dtypes in enumerate(DTYPES)]
    check(*specs, steps=2, stochastic_rounding=stochastic_rounding)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_awkward_sizes(dtype):
    check(*(Spec(n, dtype, dtype) for n in SIZES))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_unaligned_views(dtype):
    check(*(Spec(CHUNK + 5, dtype, dtype, dtype, offset=offset) for offset in (1, 2, 4)))


def test_tensors_that_are_not_contiguous():
    specs = (Spec(CHUNK + 6, transposed=True), Spec(30, BF16, BF16, transposed=True))
    check(*specs, grad_scale=2.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_maximize_multiplier_and_missing_masks(dtype):
    specs = (
        Spec(700, dtype, dtype, maximize=True),
        Spec(700, dtype, dtype, maximize=True, isolated=None),
        Spec(700, dtype, F32, isolated=1.0),
    )
    check(*specs, grad_scale=3.0)


@pytest.mark.parametrize("first", [(1 << 32) - 700, (1 << 32) - 1, 1 << 32, (5 << 32) + 3, 1 << 40])
def test_rounding_beyond_four_billion_elements(first):
    check(Spec(CHUNK + 77, BF16, BF16, BF16, index_offset=first))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_special_values(dtype):
    tiny = 1e-45 if dtype == F32 else 9.2e-41
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny, 1e-38, 3e38, -3e38, 1.0, 1e-20]
    pairs = torch.tensor(list(itertools.product(values, values)))

    def edit(items):
        for item, column in ((items[0], "grad"), (items[1], "exp_avg"), (items[2], "exp_avg_sq")):
            item.param.copy_(pairs[:, 0])
            getattr(item, column).copy_(pairs[:, 1].abs() if column == "exp_avg_sq" else pairs[:, 1])

    specs = [Spec(len(pairs), dtype, dtype, isolated=0.5) for _ in range(3)]
    for stochastic_rounding in (True, False):
        check(*specs, edit=edit, stochastic_rounding=stochastic_rounding, grad_scale=4.0)


@pytest.mark.parametrize("with_moments", [False, True], ids=["minmax", "zscore"])
def test_stats_inside_the_step(with_moments):
    specs = (
        Spec(CHUNK + 100, layer=2),
        Spec(2 * CHUNK, BF16, BF16, layer=0, u_values=(math.inf, math.nan)),
        Spec(300, F32, F32, BF16, layer=2, u_values=(-math.inf, 0.0)),
        Spec(50, layer=-1),  # takes no part
        Spec(0, layer=3),
        Spec(40, layer=3, u_values=(math.nan,) * 40),
    )
    stats = LayerStats.empty(5, torch.device("cpu"), with_moments=with_moments)
    check(*specs, stats=stats)


def test_found_inf_on_the_device_leaves_everything_and_step_as_it_was():
    specs = (Spec(100), Spec(CHUNK + 1, BF16, BF16), Spec(0), Spec(9, BF16, F32, F32))
    before, actual = make(*specs), on_device(make(*specs), specs)
    for _ in range(2):
        run_step(backend(), actual, grad_scale=4.0, found_inf=1.0)
    assert_same(actual, before)
    expected = before
    run_step(REFERENCE, expected, grad_scale=4.0)
    run_step(backend(), actual, grad_scale=4.0, found_inf=0.0)
    assert_same(actual, expected)


def test_isolated_elements_keep_their_bits():
    spec = Spec(CHUNK + 40, BF16, BF16, isolated=0.5)
    items = on_device(make(spec), (spec,))
    before = items[0].param.clone()
    for _ in range(3):
        run_step(backend(), items)
    from epi_kernels.reference import bits

    isolated = bits.unpack(items[0].isolation_mask, spec.n)
    assert torch.equal(items[0].param[isolated], before[isolated])
    assert (items[0].param[~isolated] != before[~isolated]).float().mean() > 0.9


def test_two_runs_agree_to_the_bit_with_moments():
    specs = [Spec(CHUNK * 2 + 11, layer=i % 2) for i in range(4)]
    moments = []
    for _ in range(2):
        stats = stats_on_device(LayerStats.empty(2, torch.device("cpu"), with_moments=True))
        items = on_device(make(*specs), tuple(specs))
        run_step(backend(), items, stochastic_rounding=False, stats=stats)
        moments.append(stats.moments.cpu())
    assert torch.equal(*moments)


def test_which_devices_are_refused():
    triton = backend()
    assert triton.refuses(DEVICE, torch.float16) is not None
    assert triton.refuses(DEVICE, torch.float64) is not None
    assert triton.refuses(DEVICE, torch.float32) is None
    if DEVICE.type == "cpu":
        assert triton.only_by_name(DEVICE) is not None
        assert triton.refuses(torch.device("cuda"), torch.float32) is not None


class Counted:
    """Stands for a kernel and is launched in its place."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, _grid):
        self.launches += 1
        return lambda *arguments, **options: None


@pytest.fixture
def kernels(monkeypatch):
    """(prepare, step), counted and not run."""
    from epi_kernels.backends.triton import prepare, step

    found = Counted(), Counted()
    monkeypatch.setattr(prepare, "prepare_kernel", found[0])
    monkeypatch.setattr(step, "step_kernel", found[1])
    return found


def many(repeats: int) -> MaskedEMAAdamW:
    """Small tensors keep float32 states where others have codes, and what is left of whole blocks is stepped in bounds."""
    params = [
        torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=DEVICE))
        for _ in range(repeats)
        for dtype in (F32, BF16)
        for n in (16, 8192, 5000)
    ]
    return MaskedEMAAdamW(
        params, state_dtype="int8", master_weight_bits=24, mask_interval=None, backend="triton"
    )


def step_anew(optimizer: MaskedEMAAdamW) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    optimizer.step()


def test_launches_go_by_dtypes_whatever_the_number_of_tensors(kernels):
    for repeats in (1, 50):
        for kernel in kernels:
            kernel.launches = 0
        step_anew(many(repeats))
        assert [kernel.launches for kernel in kernels] == [1, 6]


def test_the_table_of_chunks_is_kept_where_gradients_alone_are_new(kernels, monkeypatch):
    from epi_kernels.backends.triton import backend as triton_backend

    optimizer, made = many(3), []
    variants = triton_backend.step_variants
    monkeypatch.setattr(triton_backend, "step_variants", lambda forms: made.append(0) or variants(forms))
    for _ in range(4):
        step_anew(optimizer)
    assert len(made) == 1
