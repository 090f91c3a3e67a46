"""4-bit states in registers: ``reference/nibbles.py`` to the bit.

A block of elements is [ROWS, WIDTH] as everywhere (codec.py); scales are [ROWS, 1] words of the float32 whose upper
halves are stored.
"""

from __future__ import annotations

import torch
import triton.language as tl

from epi_kernels.backends.triton.codec import block_maximum, load_values, power_of_two
from epi_kernels.backends.triton.common import INT4, inlined, load_block, load_byte_address, store_block
from epi_kernels.reference import nibbles

# fmt: off
_LIMIT, _LOWEST = tl.constexpr(nibbles._LIMIT), tl.constexpr(nibbles._LOWEST << 23)
_INFINITY, _NAN = tl.constexpr(nibbles._INFINITY << 16), tl.constexpr(nibbles._NAN << 16)
_THIRD, _TWO_THIRDS, _TWELFTH = tl.constexpr(nibbles._THIRD), tl.constexpr(nibbles._TWO_THIRDS), tl.constexpr(nibbles._TWELFTH)
# of 1/2, 3/4 and 3/2
_ROOT2, _ROOT3, _ROOT6 = tl.constexpr(nibbles.ROOTS[12]), tl.constexpr(nibbles.ROOTS[13]), tl.constexpr(nibbles.ROOTS[15])
_INVERSE2, _INVERSE3, _INVERSE6 = (tl.constexpr(torch.tensor(1 / nibbles.ROOTS[c]).item()) for c in (12, 13, 15))
# fmt: on
_INT4 = tl.constexpr(INT4)


@inlined
def _word(x):
    return x.to(tl.int32, bitcast=True)


@inlined
def _float(word):
    return word.to(tl.float32, bitcast=True)


@inlined
def load_scale_words(pointers, in_bounds, FULL: tl.constexpr):
    """[ROWS, 1] int32; ``pointers``: uint16."""
    return load_block(pointers, in_bounds, FULL).to(tl.int32) << 16


@inlined
def first_element(pointer, start, KIND: tl.constexpr):
    """Where element ``start`` lies, an even one."""
    if KIND == _INT4:
        return pointer + (start >> 1)
    else:
        return pointer + start


@inlined
def load_scale_address(slot, KIND: tl.constexpr):
    """Of the scales of codes; of 4-bit ones uint16."""
    if KIND == _INT4:
        return tl.load(slot).to(tl.pointer_type(tl.uint16))
    else:
        return load_byte_address(slot)


@inlined
def load_importances(
    u, offsets, scales, scale_at, in_bounds, row_in_bounds, KIND: tl.constexpr, FULL: tl.constexpr
):
    """float32 [ROWS, WIDTH]: of a refresh, which reads each once; ``u`` and ``scales``: where ``offsets`` count from."""
    if KIND == _INT4:
        raw = load_block(u + (offsets >> 1), in_bounds, FULL).to(tl.int32)
        code = (raw >> ((offsets & 1) * 4).to(tl.int32)) & 15
        return decode_square(code, load_scale_words(scales + scale_at, row_in_bounds, FULL))
    else:
        return load_values(u + offsets, scales + scale_at, in_bounds, row_in_bounds, KIND, False, FULL)


@inlined
def load_codes(bytes_, in_bounds, FULL: tl.constexpr):
    """[ROWS, WIDTH / 2] packed bytes -> [ROWS, WIDTH] int32."""
    raw = load_block(bytes_, in_bounds, FULL).to(tl.int32)
    return tl.interleave(raw & 15, raw >> 4)


@inlined
def store_codes(
    bytes_, codes, in_bounds, byte_in_bounds, FULL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    if not FULL:
        codes = tl.where(in_bounds, codes, 0)  # padding
    low, high = tl.split(tl.reshape(codes, [ROWS, WIDTH // 2, 2]))
    store_block(bytes_, (low | (high << 4)).to(tl.uint8), byte_in_bounds, FULL)


@inlined
def decode_square(code, scale):
    """int32 codes and scales' words -> float32, exactly: ``LEVELS`` are the least of three straight lines in words."""
    word = tl.minimum(tl.minimum((2 * code - 18) << 23, (code - 13) << 23), (code - 14) << 22)
    return tl.where(code == 0, 0.0, _float(word + (127 << 23))) * _float(scale)


@inlined
def _root(square_code, INVERSE: tl.constexpr):
    """``ROOTS``, or what is 1 over them: a power of two and one of four mantissas."""
    code = tl.maximum(square_code, 1)
    shift = tl.maximum(tl.maximum((13 - code) >> 1, 9 - code), 0)
    half = (code >= 6) & (code <= 12) & ((code & 1) == 0)
    if INVERSE:
        mantissa = tl.where(
            half, _INVERSE2, tl.where(code == 13, _INVERSE3, tl.where(code == 15, _INVERSE6, 1.0))
        )
        return mantissa * power_of_two(127 + shift)
    else:
        mantissa = tl.where(half, _ROOT2, tl.where(code == 13, _ROOT3, tl.where(code == 15, _ROOT6, 1.0)))
        return mantissa * power_of_two(127 - shift)


@inlined
def decode_average(code, scale, square_code):
    magnitude = code & 7
    x = tl.minimum(_float((magnitude + 254) << 22), _float((magnitude + 256) << 22) - 2.0)
    x = _float(_word(x) | ((code & 8) << 28))
    return x * _float(scale) * _root(square_code, False)


@inlined
def _top(x, in_bounds, FULL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 1] int32: the word of the largest magnitude of a row's block."""
    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    if not FULL:
        magnitude = tl.where(in_bounds, magnitude, 0)
    return block_maximum(magnitude, ROWS, WIDTH).to(tl.int32)


@inlined
def encode_square(
    x,
    old,  # [ROWS, 1]: scales up to now
    random_bits,  # in [0, 2^23)
    in_bounds,
    STOCHASTIC: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """float32 [ROWS, WIDTH] -> codes int32, scales' words [ROWS, 1]."""
    random = 1 << 22
    if STOCHASTIC:
        random = random_bits.to(tl.int32)
    top = _top(x, in_bounds, FULL, ROWS, WIDTH)
    nonfinite = top >= _LIMIT
    finite_top = tl.where(nonfinite, 0, top)
    mantissa = tl.where((old > 0) & (old < _INFINITY), old, finite_top) & 0x7F0000
    divisor = _float(mantissa | 0x3F800000)
    inverse = tl.div_rn(tl.zeros_like(divisor) + 1.0, divisor)
    exponent = (_word(_float(finite_top) * inverse) + 0x3FFFFF) >> 23
    exponent = tl.maximum(exponent, _LOWEST >> 23)
    y = x * (inverse * power_of_two(271 - exponent))
    word = _word(y)
    middle = word - (131 << 23)
    middle = tl.where(word > (143 << 23), middle + middle - (12 << 23), middle)
    below = _float(word & 0x7F000000)
    coarse = _word(y * _THIRD + below * _TWO_THIRDS) + (1 << 23)
    coarse = ((coarse + random) >> 24) - 63
    code = tl.where(word < (136 << 23), coarse, (middle + random) >> 23)
    code = tl.where(nonfinite, 15, tl.where(x > 0.0, tl.maximum(code, 1), 0))
    scale = tl.where(top == 0, 0, (exponent << 23) | mantissa)
    return code, tl.where(nonfinite, _INFINITY, scale)


@inlined
def encode_average(
    x,
    square_code,
    square_scale,
    bound,
    random_bits,  # in [0, 2^16)
    in_bounds,
    STOCHASTIC: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """float32 [ROWS, WIDTH] -> codes int32, scales' words [ROWS, 1]."""
    random = 0x8000
    if STOCHASTIC:
        random = random_bits.to(tl.int32)
    scaled = tl.abs(x) * _root(square_code, True)
    top = _top(scaled, in_bounds, FULL, ROWS, WIDTH)
    nonfinite = top >= _LIMIT
    largest = _float(tl.where(nonfinite, 0, top))
    cut = bound * tl.sqrt_rn(_float(square_scale))
    largest = tl.where(cut < largest, cut, largest)
    scale = _float((_word(largest * _TWELFTH) + 0xFFFF) & -0x10000)
    scale = _float(tl.maximum(_word(scale), _LOWEST))  # positive floats are ordered as their words are
    y = scaled * tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    y = tl.where(y < 12.0, y, 12.0)
    word = tl.maximum(_word(y), _word(y + 2.0) - (1 << 23))
    code = (((word >> 6) + random) >> 16) - 254
    code = tl.where(nonfinite, 0, code | ((_word(x) >> 28) & 8))
    word = tl.where(top == 0, 0, _word(scale))
    return code, tl.where(nonfinite, _NAN, word)


@inlined
def moment_bound(beta1, one_minus_beta1, beta2, one_minus_beta2):
    """``one_minus_beta1`` is negative where the gradient is."""
    zero = tl.zeros([1, 1], tl.float32)
    ratio = tl.div_rn(beta1 * beta1 + zero, beta2 + zero)
    bound = tl.div_rn(tl.abs(one_minus_beta1) + zero, tl.sqrt_rn(one_minus_beta2 * (1.0 - ratio)))
    return tl.where(ratio < 1.0, bound, float("inf"))
