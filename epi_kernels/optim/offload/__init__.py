"""``offload="cpu"``: parameters are stepped in host memory, one by one, with gradients and weights copied there and back."""

from epi_kernels.optim.offload.pipeline import HostPipeline
from epi_kernels.optim.offload.plan import OffloadedPlan

__all__ = ["HostPipeline", "OffloadedPlan"]
