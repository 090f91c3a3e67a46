"""bfloat16 weights with more bits beside them, from the value's side: numbers divided by their spacing and rounded.

Nothing here imports epi_kernels or torch.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32


def narrowed(x: np.ndarray, bits: int, r16: np.ndarray | None) -> np.ndarray:
    """float32 [n] -> the values that weights of 24 or 32 bits can take, up by random bits or to nearest even."""
    if bits == 32:
        return np.where(np.isnan(x), F32(np.nan), x)
    spaces, spacing = _spaces(x, 16)
    whole = np.rint(spaces) if r16 is None else np.floor(spaces + (r16 >> 8) / 256.0)
    return _signed_value(whole, spacing, x)


def nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bfloat16 values nearest to float32 ones, ties away from zero."""
    spaces, spacing = _spaces(x, 8)
    return _signed_value(np.floor(spaces + 0.5), spacing, x)


def correction(x: np.ndarray, bits: int) -> np.ndarray:
    """int8 or int16 [n]: how many float32 words (of 24 bits, or of 32) lie between a weight and its bfloat16."""
    words = [np.ascontiguousarray(v, F32).view(np.int32).astype(np.int64) for v in (x, nearest_bfloat16(x))]
    apart = np.where(np.isnan(x), 0, words[0] - words[1])
    return (apart >> (32 - bits)).astype(np.int8 if bits == 24 else np.int16)


def _spaces(x: np.ndarray, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """|x| over the spacing of numbers with so many binary digits in its binade, exact in float64."""
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0).astype(np.float64))
    spacing = np.ldexp(1.0, np.maximum(exponent, -125) - digits)
    return np.abs(np.where(np.isfinite(x), x, 0.0).astype(np.float64)) / spacing, spacing


def _signed_value(whole: np.ndarray, spacing: np.ndarray, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = np.copysign(whole * spacing, x).astype(F32)
    return np.where(np.isfinite(x), value, x).astype(F32)
