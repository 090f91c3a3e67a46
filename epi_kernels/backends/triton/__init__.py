"""Triton kernels: multi-tensor launches of the four stages. The only package that imports Triton."""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"triton cannot be imported: {error}") from error

from epi_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
