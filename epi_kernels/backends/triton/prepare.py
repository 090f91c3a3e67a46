"""What a step needs to know of ``t``, computed where ``step`` lies: the host never waits for it.

One row a tensor, before the step kernel. The arithmetic is that of ``reference.scalars``, float64 operation by
float64 operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epi_kernels.backends import table
from epi_kernels.backends.triton.common import mix
from epi_kernels.reference.scalars import StepScalars

# A tensor's row: the columns of backends/table.py; the float32 scalars, two to a column (StepScalars in its order
# and the gradient's multiplier); lr, beta1, beta2, eps and weight_decay as float64; where lr lies if it is read anew at
# every step, or 0; the key of the step's random numbers. What is written here is written anew by every step: a CUDA graph
# goes on with the same row.
SCALARS = table.COLUMNS
HYPER = SCALARS + (table.SCALAR_COLUMNS + 2) // 2
LR, KEY = HYPER + 5, HYPER + 6
ROW = HYPER + 7
PREPARE_BLOCK = 128
POWERING_STEPS = 32  # binary digits of t

_STEP, _RNG_KEY, _FLAGS = tl.constexpr(table.STEP), tl.constexpr(table.RNG_KEY), tl.constexpr(table.FLAGS)
_SKIPPED = tl.constexpr(table.SKIPPED)
_LR, _KEY = tl.constexpr(LR), tl.constexpr(KEY)
_SCALARS, _HYPER, _ROW = tl.constexpr(SCALARS), tl.constexpr(HYPER), tl.constexpr(ROW)
_DIGITS = tl.constexpr(POWERING_STEPS)
_EPS = tl.constexpr(StepScalars._fields.index("eps"))
_DECAY = tl.constexpr(StepScalars._fields.index("decay"))
_STEP_SIZE = tl.constexpr(StepScalars._fields.index("step_size"))
_MULTIPLIER = tl.constexpr(table.SCALAR_COLUMNS)


@triton.jit(do_not_specialize=["n", "mixed_seed"])
def prepare_kernel(
    tensors,  # [n, ROW] int64; what depends on the step is written
    n,
    mixed_seed,  # uint32 in an int64
    grad_scale,  # [1] fp32, where UNSCALE
    found_inf,  # [1] fp32, where SKIPPABLE
    UNSCALE: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < n
    row = tensors + index.to(tl.int64) * _ROW
    step = tl.load(row + _STEP, mask=there, other=0).to(tl.pointer_type(tl.float32))
    before = tl.load(step, mask=there, other=0.0)
    t = before.to(tl.int64) + 1

    hyper = (row + _HYPER).to(tl.pointer_type(tl.float64), bitcast=True)
    lr = tl.load(hyper, mask=there, other=0.0)
    base1 = tl.load(hyper + 1, mask=there, other=0.0)
    base2 = tl.load(hyper + 2, mask=there, other=0.0)
    eps = tl.load(hyper + 3, mask=there, other=0.0)
    weight_decay = tl.load(hyper + 4, mask=there, other=0.0)
    lr_address = tl.load(row + _LR, mask=there, other=0)
    lr_moves = lr_address != 0
    moved = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=lr_moves, other=0.0).to(tl.float64)
    lr = tl.where(lr_moves, moved, lr)
    power1 = tl.full([BLOCK], 1.0, tl.float64)
    power2 = tl.full([BLOCK], 1.0, tl.float64)
    digits = t
    for _ in range(_DIGITS):
        power1 = tl.where((digits & 1) != 0, power1 * base1, power1)
        power2 = tl.where((digits & 1) != 0, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
        digits = digits >> 1
    root = tl.sqrt(1.0 - power2)
    scalars = (row + _SCALARS).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scalars + _EPS, (eps * root).to(tl.float32), mask=there)
    tl.store(scalars + _DECAY, (1.0 - lr * weight_decay).to(tl.float32), mask=lr_moves)
    tl.store(scalars + _STEP_SIZE, (lr * root / (1.0 - power1)).to(tl.float32), mask=there)
    if UNSCALE:
        multiplier = (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32)
        tl.store(scalars + _MULTIPLIER, multiplier + tl.zeros([BLOCK], tl.float32), mask=there)

    rng_id = tl.load(row + _RNG_KEY, mask=there, other=0).to(tl.uint32)
    seed = mixed_seed.to(tl.uint32)
    key = mix(mix(seed ^ t.to(tl.uint32)) ^ rng_id)
    tl.store(row + _KEY, key.to(tl.int64), mask=there)

    after = before + 1.0
    if SKIPPABLE:
        skipped = tl.load(found_inf) != 0.0
        flags = tl.load(row + _FLAGS, mask=there, other=0)
        tl.store(row + _FLAGS, tl.where(skipped, flags | _SKIPPED, flags & ~_SKIPPED), mask=there)
        after = tl.where(skipped, before, after)
    tl.store(step, after, mask=there)
