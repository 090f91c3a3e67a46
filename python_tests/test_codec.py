"""The 8-bit codec of reference/codec.py: what it stores, and that it loses nothing it should keep."""

import itertools

import pytest
import torch

from epi_kernels.reference import codec
from python_tests import oracle_codec
from python_tests.harness import assert_same_bits

SCALES = [0, 1, 2, 100, 103, 126, 200, 222]  # exp_avg's end at 222, exp_avg_sq's at 230


def _all_codes(signed: bool) -> torch.Tensor:
    codes = torch.arange(256)
    return (codes if signed else codes[(codes == 0) | (codes >= 4)]).to(torch.uint8)


@pytest.mark.parametrize(("scale", "signed"), [*itertools.product(SCALES, [True, False]), (230, False)])
def test_values_on_the_grid_come_back_whatever_the_random_bits(scale, signed):
    codes = _all_codes(signed)
    for code in codes.split(63):
        block = torch.cat(
            [code, torch.tensor([127 if signed else 255], dtype=torch.uint8)]
        )  # holds the scale
        scales = torch.tensor([scale], dtype=torch.uint8)
        values = codec.decode(block, scales, signed=signed)
        for random in (0, 1, 0x8000, 0xFFFF):
            again, scales_again = codec.encode(values, torch.full(block.shape, random), signed=signed)
            assert torch.equal(codec.decode(again, scales_again, signed=signed), values)


def test_what_a_code_stands_for():
    codes, scales = (
        torch.tensor([0, 4, 5, 14, 15, 16, 24, 255], dtype=torch.uint8),
        torch.tensor([103], dtype=torch.uint8),
    )
    below = [2.0**-20, 1.5 * 2.0**-20, 2.0**-15, 1.5 * 2.0**-15]
    expected = torch.tensor([0.0, *below, 2.0**-14, 1.5 * 2.0**-14, 1.9375])
    assert torch.equal(codec.decode(codes, scales, signed=False), expected)
    codes = torch.tensor([0, 1, 16, 127, 0x80 | 127], dtype=torch.uint8)
    expected = torch.tensor([0.0, 2.0**-10, 2.0**-6, 1.9375, -1.9375])
    assert torch.equal(codec.decode(codes, scales, signed=True), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_bytes_are_zero_and_zero_is_zero_bytes(signed):
    codes, scales = codec.encode(torch.zeros(100), None, signed=signed)
    assert not codes.any() and not scales.any() and len(scales) == 2
    assert not codec.decode(codes, scales, signed=signed).any()


def test_a_positive_second_moment_never_becomes_zero():
    x = torch.full((64,), 1e-38)
    x[0] = 1e30
    for random in (0, 0xFFFF):
        values = codec.decode(*codec.encode(x, torch.full((64,), random), signed=False), signed=False)
        assert (values > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3.4e38])
@pytest.mark.parametrize("signed", [True, False])
def test_a_block_with_a_value_that_is_not_finite_says_so_and_its_neighbours_do_not(bad, signed):
    x = torch.ones(150)
    x[70] = bad
    codes, scales = codec.encode(x, None, signed=signed)
    values = codec.decode(codes, scales, signed=signed)
    assert scales.tolist().count(codec.NONFINITE) == 1
    assert not torch.isfinite(values[64:128]).any()
    assert torch.equal(values[:64], x[:64]) and torch.equal(values[128:], x[128:])


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_is_unbiased_in_the_value(signed):
    # all 2^16 random words against every value: the mean is the value, but for the floor's 2^-17 of a step
    x = torch.tensor([1.0, 0.731, 0.0101, 0.52, 0.003, 0.00071] + [0.9] * 58)
    if not signed:
        x[6:10] = torch.tensor([6e-5, 4.1e-5, 2.3e-6, 1.1e-6])  # the binades of two codes
    total = torch.zeros(64, dtype=torch.float64)
    for words in torch.arange(1 << 16).split(1 << 13):
        codes, scales = codec.encode(x.repeat(len(words)), words.repeat_interleave(64), signed=signed)
        total += codec.decode(codes, scales, signed=signed).double().view(-1, 64).sum(0)
    mean = total / (1 << 16)
    assert torch.allclose(mean, x.double(), rtol=1e-5, atol=1e-6 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_to_nearest_errs_by_at_most_half_a_step(signed):
    x = torch.rand(6400, generator=torch.Generator().manual_seed(1)) + 0.02
    values = codec.decode(*codec.encode(x, None, signed=signed), signed=signed)
    assert ((values - x).abs() <= x / 32 + (2.0**-11 if signed else 0)).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("stochastic", [True, False])
def test_the_oracle_stores_the_same_values(signed, stochastic):
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-40, 30, (200, 1), generator=generator)
    x = torch.randn(200, 64, generator=generator) * 10.0**exponents
    x *= 10.0 ** torch.randint(-8, 1, x.shape, generator=generator)
    x = torch.cat([x.reshape(-1), torch.randn(7), torch.tensor([0.0, -0.0, 1e-45, 2.0**120, 1.96875])])
    x = x if signed else x.abs()
    random = torch.randint(0, 1 << 16, x.shape, generator=generator) if stochastic else None
    codes, scales = codec.encode(x, random, signed=signed)
    expected = oracle_codec.stored(x.numpy(), None if random is None else random.numpy(), signed=signed)
    assert_same_bits(codec.decode(codes, scales, signed=signed).numpy(), expected, "stored")
    assert_same_bits(oracle_codec.values(codes.numpy(), scales.numpy(), signed=signed), expected, "decoded")
