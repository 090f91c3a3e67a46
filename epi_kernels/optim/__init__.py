"""MaskedEMAAdamW: groups, state and the order of the stages."""

from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW
from epi_kernels.optim.report import IsolationReport

__all__ = ["IsolationReport", "MaskedEMAAdamW"]
