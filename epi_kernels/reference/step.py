"""Stage 1, step: the masked AdamW update with the importance EMA.

Every operation below is one IEEE-rounded operation; the order is the contract. No ``addcmul`` or
``lerp``: their kernels may contract a product and a sum into one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_kernels.reference import bits, codec, master, nibbles, rounding
from epi_kernels.reference.scalars import StepScalars
from epi_kernels.reference.tensors import ParamTensors


def _load(state: Tensor, scale: Tensor | None, opmath: torch.dtype, *, signed: bool = False) -> Tensor:
    """[n] opmath: a state's values, row-major."""
    values = state.reshape(-1) if scale is None else codec.decode(state.reshape(-1), scale, signed=signed)
    return values.to(opmath)


def _load_moments(tensors: ParamTensors, opmath: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n] opmath each: exp_avg and exp_avg_sq, row-major."""
    if not tensors.has_nibbles:
        exp_avg = _load(tensors.exp_avg, tensors.exp_avg_scale, opmath, signed=True)
        return exp_avg, _load(tensors.exp_avg_sq, tensors.exp_avg_sq_scale, opmath)
    assert tensors.exp_avg_scale is not None and tensors.exp_avg_sq_scale is not None
    n = tensors.param.numel()
    codes, sq_codes = nibbles.unpack(tensors.exp_avg, n), nibbles.unpack(tensors.exp_avg_sq, n)
    exp_avg = nibbles.decode_exp_avg(codes, tensors.exp_avg_scale, sq_codes)
    return exp_avg.to(opmath), nibbles.decode_exp_avg_sq(sq_codes, tensors.exp_avg_sq_scale).to(opmath)


def _store_nibbles(
    tensors: ParamTensors,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    r_exp_avg: Tensor | None,
    r_exp_avg_sq: Tensor | None,
    bound: float,
) -> None:
    assert tensors.exp_avg_scale is not None and tensors.exp_avg_sq_scale is not None
    second = nibbles.encode_exp_avg_sq(exp_avg_sq.float(), tensors.exp_avg_sq_scale, r_exp_avg_sq)
    codes, scales = nibbles.encode_exp_avg(exp_avg.float(), r_exp_avg, second, bound)
    tensors.exp_avg.copy_(nibbles.pack(codes))
    tensors.exp_avg_sq.copy_(nibbles.pack(second[0]))
    tensors.exp_avg_scale.copy_(scales)
    tensors.exp_avg_sq_scale.copy_(second[1])


def _store(
    state: Tensor, scale: Tensor | None, value: Tensor, random_bits: Tensor | None, *, signed: bool = False
) -> None:
    """``state[...] = value`` in state's dtype, row-major; with ``scale``, as codes."""
    if scale is None:
        state.copy_(_rounded(value, state.dtype, random_bits).view(state.shape))
        return
    codes, scales = codec.encode(value.to(torch.float32), random_bits, signed=signed)
    state.copy_(codes.view(state.shape))
    scale.copy_(scales)


def _rounded(value: Tensor, dtype: torch.dtype, random_bits: Tensor | None) -> Tensor:
    if dtype == torch.bfloat16 and random_bits is not None:
        return rounding.round_bfloat16(value.to(torch.float32), random_bits)
    return value.to(dtype)


def step_(
    tensors: ParamTensors,
    grad: Tensor,
    scalars: StepScalars,
    *,
    rng_key: int | None,
    grad_multiplier: float | None = None,
) -> None:
    """Updates param (and its correction), exp_avg, exp_avg_sq and importance of one parameter in place; ``step`` is
    not its business.

    ``rng_key`` (``rounding.stream_key``): None rounds to nearest. ``grad_multiplier`` is the float32 reciprocal
    of a loss scale; the unscaled gradient is written back to ``grad``, as torch's fused step does.
    """
    opmath = torch.float64 if tensors.param.dtype == torch.float64 else torch.float32

    n = tensors.param.numel()
    theta = tensors.param.reshape(-1)
    correction = tensors.weight_correction
    theta = theta.to(opmath) if correction is None else master.join(theta, correction.reshape(-1))
    g = grad.reshape(-1).to(opmath)
    if grad_multiplier is not None:
        g = g * grad_multiplier
        grad.copy_(g.view(grad.shape))  # written in grad's dtype
    if tensors.maximize:
        g = -g

    g_squared = g * g
    m, v = _load_moments(tensors, opmath)
    m = scalars.beta1 * m + scalars.one_minus_beta1 * g
    v = scalars.beta2 * v + scalars.one_minus_beta2 * g_squared
    denom = rounding.exact_sqrt(v) + scalars.eps
    new = scalars.decay * theta - scalars.step_size * (m / denom)

    r_theta = r_exp_avg = r_exp_avg_sq = r_importance = r_nibble = None
    if rng_key is not None:
        index = rounding.logical_index(
            n, theta.device, offset=tensors.index_offset, run=tensors.index_run, stride=tensors.index_stride
        )
        w0, w1 = rounding.random_words(rng_key, index)
        r_theta, r_exp_avg = w0 & 0xFFFF, w0 >> 16
        r_exp_avg_sq, r_importance, r_nibble = w1 & 0xFFFF, w1 >> 16, w1 & 0x7FFFFF
    if tensors.has_nibbles:
        _store_nibbles(tensors, m, v, r_exp_avg, r_nibble, nibbles.moment_bound(scalars))
    else:
        _store(tensors.exp_avg, tensors.exp_avg_scale, m, r_exp_avg, signed=True)
        _store(tensors.exp_avg_sq, tensors.exp_avg_sq_scale, v, r_exp_avg_sq)
    if tensors.importance is not None:
        u = _load(tensors.importance, tensors.importance_scale, opmath)
        u = scalars.beta_u * u + scalars.one_minus_beta_u * g_squared
        _store(tensors.importance, tensors.importance_scale, u, r_importance)
    if correction is None:
        written = [(tensors.param, _rounded(new, tensors.param.dtype, r_theta))]
    else:
        weight, low = master.split(new, correction.dtype, r_theta)
        written = [(tensors.param, weight), (correction, low)]
    for target, value in written:
        value = value.view(target.shape)
        if tensors.isolation_mask is not None:
            isolated = bits.unpack(tensors.isolation_mask, n).view(target.shape)
            value = torch.where(isolated, target, value)
        target.copy_(value)
