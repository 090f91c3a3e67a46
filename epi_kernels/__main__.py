"""`python -m epi_kernels` is `epi-kernels`."""

import sys

from epi_kernels.cli import main

sys.exit(main())
