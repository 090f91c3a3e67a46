"""8-bit states in numpy, from the value's side: where the package adds to words, this takes logarithms.

Nothing here imports epi_kernels or torch.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32
BLOCK = 64
MIN_ELEMENTS = 4096


def stored(x: np.ndarray, r16: np.ndarray | None, *, signed: bool) -> np.ndarray:
    """float32 [n] -> the values that come back from codes and scales."""
    n, padding = x.size, -x.size % BLOCK
    x = np.pad(np.asarray(x, F32), (0, padding)).reshape(-1, BLOCK)
    share = np.full(x.shape, 0.5) if r16 is None else np.pad(r16 / 65536.0, (0, padding)).reshape(-1, BLOCK)
    word = np.abs(x).view(np.uint32).astype(np.int64)
    exponent = (word.max(axis=1, keepdims=True) + 0x7FFFF) >> 23  # the next binade from 31/32 of one on
    bad = exponent >= (247 if signed else 255)
    e = np.maximum(np.where(bad, 0, exponent), 24) - 127.0
    with np.errstate(all="ignore"):
        y = np.where(bad, 0.0, np.abs(x).astype(np.float64)) * 2.0**-e
        code = np.floor((_signed_code(y) if signed else _unsigned_code(y)) + share)
        if not signed:
            code = np.maximum(code, np.where(y > 0, 4, 0))
        field, mantissa = np.floor(code / 16), np.mod(code, 16)
        normal = (1 + mantissa / 16) * 2.0 ** (e + field - (7 if signed else 15))
        octave, half = np.floor(code / 2), np.mod(code, 2)
        coarse = np.where(code > 0, (1 + half / 2) * 2.0 ** (e + octave - 22), 0.0)
        value = np.where(field > 0, normal, mantissa * 2.0 ** (e - 10) if signed else coarse)
    value = np.copysign(value, x) if signed else value
    value = np.where(bad, np.nan if signed else np.inf, value)
    return value.astype(F32).reshape(-1)[:n]


def _linear_between_powers(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """floor(log2 y), and how far y lies between that power of two and the next."""
    fraction, exponent = np.frexp(y)
    return exponent - 1, 2 * fraction - 1


def _unsigned_code(y: np.ndarray) -> np.ndarray:
    k, between = _linear_between_powers(y)
    code = np.where(k >= -14, 16 * (k + 15) + 16 * between, 2 * (k + 22) + 2 * between)
    return np.where(y > 0, code, 0.0)


def _signed_code(y: np.ndarray) -> np.ndarray:
    k, between = _linear_between_powers(y * 128)
    small = 8 * ((y * 128).astype(F32) + F32(2) - F32(2)).astype(np.float64)  # one float32 rounding
    return np.where(y * 128 >= 2, 16 * k + 16 * between, small)


def values(codes: np.ndarray, scales: np.ndarray, *, signed: bool) -> np.ndarray:
    """uint8 [n], uint8 [ceil(n / 64)] -> float32 [n], element by element from the format's description."""
    scale = np.repeat(scales.astype(np.float64), BLOCK)[: codes.size]
    e = scale + 24 - 127
    sign = np.where(codes >= 128, -1.0, 1.0) if signed else 1.0
    code = codes.astype(np.int64) & (0x7F if signed else 0xFF)
    # binary16: 5 bits of exponent, 10 of mantissa
    word = code << 6 if signed else np.where(code < 16, code << 9, (code + 112) << 6)
    half = word.astype(np.uint16).view(np.float16).astype(np.float64)
    value = sign * half * 2.0 ** (e + (8 if signed else -7))
    return np.where(scale == 255, np.nan if signed else np.inf, value).astype(F32)
