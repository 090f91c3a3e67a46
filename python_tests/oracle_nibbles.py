"""4-bit states in numpy, from the values' side: levels in a table, rounding as a share of the way between two.

Nothing here imports epi_kernels or torch.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32
BLOCK = 64
LEVELS = np.array([0.0, *(2.0**-k for k in (16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1)), 0.75, 1.0, 1.5])
MAGNITUDES = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0])
# exp_avg's units; of level 0 that of the smallest
ROOTS = np.sqrt(np.array([LEVELS[1], *LEVELS[1:]])).astype(F32)
BAD = 2.0**123
LOWEST = 2.0**-103


def bound(beta1: float, beta2: float) -> np.float32:
    """The most that |exp_avg| / sqrt(exp_avg_sq) can be; betas as float32 has them, and what is missing to 1 as well."""
    b1, b2, left1, left2 = (F32(x) for x in (beta1, beta2, 1 - beta1, 1 - beta2))
    with np.errstate(all="ignore"):
        ratio = b1 * b1 / b2
        return left1 / np.sqrt(left2 * (F32(1) - ratio)) if ratio < 1 else F32(np.inf)


def _blocks(x: np.ndarray) -> np.ndarray:
    return np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _random(random: np.ndarray | None, bits: int, like: np.ndarray) -> np.ndarray:
    """Shares of a code's step that are added before it is cut, of whole numbers of so many bits."""
    return np.full(like.shape, 0.5) if random is None else _blocks(random.astype(np.float64)) / 2.0**bits


def _upper(x: np.ndarray, add: int = 0) -> np.ndarray:
    """float32 cut to the upper half of its word, after something was added to the word."""
    word = (np.asarray(x, F32).view(np.uint32).astype(np.int64) + add) & 0xFFFF0000
    return word.astype(np.uint32).view(F32)


def stored(
    m: np.ndarray,
    v: np.ndarray,
    mantissas: np.ndarray,
    r_m: np.ndarray | None,
    r_v: np.ndarray | None,
    most: np.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp_avg and exp_avg_sq as they come back, and the blocks' mantissas in [1, 2), 0 where there is none yet."""
    n, m, v = m.size, _blocks(np.asarray(m, F32)), _blocks(np.asarray(v, F32))
    with np.errstate(all="ignore"):
        codes, square, mantissas = _squares(v, mantissas.reshape(-1, 1), _random(r_v, 23, v))
        values = _averages(m, codes, square, _random(r_m, 16, m), most)
        second = np.where(np.isfinite(square), (LEVELS[codes] * square).astype(F32), F32(np.inf))
    return values.reshape(-1)[:n], second.reshape(-1)[:n], mantissas.reshape(-1)


def _squares(v: np.ndarray, old: np.ndarray, random: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, the blocks' scales, and their mantissas."""
    top = np.abs(v).max(axis=1, keepdims=True)
    bad = ~(top < BAD)
    top = np.where(bad, F32(0), top)
    word = 127 << 23 | (top.view(np.uint32).astype(np.int64) & 0x7F0000)
    mantissa = np.where(old > 0, old, word.astype(np.uint32).view(F32)).astype(F32)
    inverse = F32(1) / mantissa
    fraction, exponent = np.frexp((top * inverse).astype(F32))
    exponent = np.where(2 * fraction > 1.5, exponent, exponent - 1)  # 1.5 units hold the largest value
    exponent = np.where(top > 0, np.maximum(exponent, -103), -103)
    unit = 2.0 ** exponent.astype(np.float64)
    y = np.where(bad, F32(0), v) * (inverse * (2.0**17 / unit).astype(F32))  # in units of 2^-17 of the scale
    below = (np.searchsorted(LEVELS[1:] * 2.0**17, y.astype(np.float64), side="right")).clip(1, 15)
    low = LEVELS[below] * 2.0**17
    way = (y.astype(np.float64) - low) / (np.append(LEVELS, 2.0)[below + 1] * 2.0**17 - low)
    # a share of thirds is rounded to float32 as a sum of two products
    lows = low.astype(F32)
    thirds = (y * F32(1 / 3) + lows * F32(2 / 3)).astype(F32).astype(np.float64) / low - 1
    way = np.where(below < 5, thirds, way)
    code = np.floor(below + way + random).astype(np.int64).clip(1, 15)
    code = np.where(bad, 15, np.where(v > 0, code, 0))
    scale = np.where(bad, np.inf, np.where(top > 0, mantissa * unit, 0.0))
    return code, scale, np.where(bad | (top == 0), F32(0), mantissa)


def _averages(
    m: np.ndarray, codes: np.ndarray, square: np.ndarray, random: np.ndarray, most: np.float32
) -> np.ndarray:
    scaled = np.abs(m) * (F32(1) / ROOTS[codes])
    top = scaled.max(axis=1, keepdims=True)
    bad = ~(top < BAD)
    top = np.where(bad, F32(0), top)
    cut = most * np.sqrt(square.astype(F32))
    scale = np.maximum(_upper(np.where(cut < top, cut, top) * F32(1 / 12), 0xFFFF), F32(LOWEST))
    y = np.where(bad, F32(0), scaled) * (F32(1) / scale)
    y = np.where(y < 12, y, F32(12))
    grid = ((y + F32(2)) - F32(2)).astype(np.float64)  # one float32 rounding
    y = np.where(y < 2, grid, y.astype(np.float64))
    below = (np.searchsorted(MAGNITUDES, y, side="right") - 1).clip(0, 7)
    way = (y - MAGNITUDES[below]) / (np.append(MAGNITUDES, 16.0)[below + 1] - MAGNITUDES[below])
    code = np.floor(below + way + random).astype(np.int64).clip(0, 7)
    value = np.copysign((MAGNITUDES[code] * scale.astype(np.float64)).astype(F32) * ROOTS[codes], m)
    return np.where(bad, np.nan, value).astype(F32)


def mantissas(scales: np.ndarray) -> np.ndarray:
    """Of scales as floats: in [1, 2), 0 where there is none."""
    good = np.isfinite(scales) & (scales > 0)
    return np.where(good, 2 * np.frexp(np.where(good, scales, 1))[0], 0).astype(F32)


def values(codes: np.ndarray, scales: np.ndarray, square_codes: np.ndarray | None = None) -> np.ndarray:
    """float32 [n] of packed codes and scales as floats, from the format's description; of exp_avg beside the packed
    codes of exp_avg_sq. As many as there are nibbles."""
    code = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
    scale = np.repeat(np.asarray(scales, np.float64), BLOCK)[: code.size]
    code = code[: scale.size]
    if square_codes is None:
        value = LEVELS[code] * scale
    else:
        square = np.stack([square_codes & 15, square_codes >> 4], axis=1).reshape(-1)[: code.size]
        value = (np.where(code & 8, -1.0, 1.0) * MAGNITUDES[code & 7] * scale).astype(F32) * ROOTS[square]
    return value.astype(F32)
