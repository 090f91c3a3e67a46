"""EPI as its paper describes it: the harness's own, so that the tables and the benchmark step the same optimizer."""

from epi_kernels.repro.methods.published import PublishedEPI

__all__ = ["PublishedEPI"]
