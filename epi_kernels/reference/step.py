"""Stage 1, step: the masked AdamW update with the importance EMA.

Every operation below is one IEEE-rounded operation; the order is the contract. No ``addcmul`` or
``lerp``: their kernels may contract a product and a sum into one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_kernels.reference import bits, rounding
from epi_kernels.reference.tensors import ParamTensors


def exact_sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root. torch's float32 root on CPUs is an ulp off for some inputs."""
    return x.double().sqrt().to(x.dtype)


def _store(target: Tensor, value: Tensor, random_bits: Tensor | None, keep: Tensor | None = None) -> None:
    """``target[...] = value`` in target's dtype, row-major; elements where ``keep`` retain their bits."""
    if target.dtype == torch.bfloat16 and random_bits is not None:
        value = rounding.round_bfloat16(value.to(torch.float32), random_bits)
    value = value.to(target.dtype).view(target.shape)
    target.copy_(value if keep is None else torch.where(keep.view(target.shape), target, value))


def step_(tensors: ParamTensors, *, stochastic_rounding: bool, grad_multiplier: float | None = None) -> None:
    """Updates param, exp_avg, exp_avg_sq and importance of one parameter in place.

    ``grad_multiplier`` is the float32 reciprocal of a loss scale; the unscaled gradient is written
    back to ``grad``, as torch's fused step does.
    """
    scalars, grad = tensors.scalars, tensors.grad
    assert scalars is not None and grad is not None
    opmath = torch.float64 if tensors.param.dtype == torch.float64 else torch.float32

    theta = tensors.param.reshape(-1).to(opmath)
    g = grad.reshape(-1).to(opmath)
    if grad_multiplier is not None:
        g = g * grad_multiplier
        grad.copy_(g.view(grad.shape))  # written in grad's dtype
    if tensors.maximize:
        g = -g

    g_squared = g * g
    m = scalars.beta1 * tensors.exp_avg.reshape(-1).to(opmath) + scalars.one_minus_beta1 * g
    v = scalars.beta2 * tensors.exp_avg_sq.reshape(-1).to(opmath) + scalars.one_minus_beta2 * g_squared
    denom = exact_sqrt(v) + scalars.eps
    new = scalars.decay * theta - scalars.step_size * (m / denom)

    n = theta.numel()
    w0 = w1 = None
    if stochastic_rounding:
        w0, w1 = rounding.random_words(tensors.rng_key, tensors.index_offset, n, theta.device)
    isolated = None if tensors.isolation_mask is None else bits.unpack(tensors.isolation_mask, n)
    _store(tensors.exp_avg, m, None if w0 is None else w0 >> 16)
    _store(tensors.exp_avg_sq, v, None if w1 is None else w1 & 0xFFFF)
    if tensors.importance is not None:
        u = scalars.beta_u * tensors.importance.reshape(-1).to(opmath) + scalars.one_minus_beta_u * g_squared
        _store(tensors.importance, u, None if w1 is None else w1 >> 16)
    _store(tensors.param, new, None if w0 is None else w0 & 0xFFFF, keep=isolated)
