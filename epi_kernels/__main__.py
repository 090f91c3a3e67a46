"""`python -m epi_kernels` is `epi-kernels`."""

from epi_kernels.cli import program

program()
