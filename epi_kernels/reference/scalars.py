"""Host scalars of one step: computed in float64, rounded once to float32."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple


class HyperParameters(NamedTuple):
    """What a param group says of the step, in float64."""

    lr: float
    beta1: float
    beta2: float
    beta_u: float  # beta2 where the importance is shared
    eps: float
    weight_decay: float


class StepScalars(NamedTuple):
    """What the step needs to know of one parameter's hyper-parameters at its step ``t``.

    Each value is a Python float that float32 represents exactly (float64 parameters keep float64).
    The order of the fields is the order of the columns in the tables the compiled backends read.
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    beta_u: float
    one_minus_beta_u: float
    eps: float  # eps * sqrt(1 - beta2^t)
    decay: float  # 1 - lr * weight_decay
    step_size: float  # lr * sqrt(1 - beta2^t) / (1 - beta1^t)


def round_to_float32(value: float) -> float:
    return ctypes.c_float(value).value


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` in float64 by binary powering: multiplications only, so a device can repeat it."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def step_scalars(t: int, hyper: HyperParameters, *, double: bool = False) -> StepScalars:
    """Scalars of step ``t`` (counted from 1). ``double`` keeps float64, for float64 parameters."""
    bias_correction1 = 1.0 - power(hyper.beta1, t)
    bias_correction2_sqrt = math.sqrt(1.0 - power(hyper.beta2, t))
    scalars = StepScalars(
        beta1=hyper.beta1,
        one_minus_beta1=1.0 - hyper.beta1,
        beta2=hyper.beta2,
        one_minus_beta2=1.0 - hyper.beta2,
        beta_u=hyper.beta_u,
        one_minus_beta_u=1.0 - hyper.beta_u,
        eps=hyper.eps * bias_correction2_sqrt,
        decay=1.0 - hyper.lr * hyper.weight_decay,
        step_size=hyper.lr * bias_correction2_sqrt / bias_correction1,
    )
    return scalars if double else StepScalars(*map(round_to_float32, scalars))


def reciprocal_scale(grad_scale: float) -> float:
    """What a gradient under a loss scale is multiplied by."""
    return round_to_float32(1.0 / grad_scale)
