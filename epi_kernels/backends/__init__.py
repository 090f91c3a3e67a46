"""Backends: the same four stages on different machinery, and the choice between them."""

from epi_kernels.backends.dispatch import available, choose
from epi_kernels.backends.protocol import Backend

__all__ = ["Backend", "available", "choose"]
