"""`epi-kernels kernels`: what the compilers made of every kernel, without a GPU."""

from epi_kernels.kernels_report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
