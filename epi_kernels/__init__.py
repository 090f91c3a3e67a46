"""AdamW with evolving parameter isolation inside the fused step.

Nothing is imported until it is asked for: `import epi_kernels` needs neither torch's
compiled extension, Triton, CUDA nor transformers, and `epi-kernels --help` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AdaptiveInterval",
    "AdaptiveRatio",
    "IsolationReport",
    "MaskedEMAAdamW",
    "__version__",
    "enable_gradient_release",
    "load_isolation",
    "save_isolation",
]

# public name -> module that defines it
_LAZY = {
    "AdaptiveInterval": "epi_kernels.policies.schedule",
    "AdaptiveRatio": "epi_kernels.policies.schedule",
    "IsolationReport": "epi_kernels.optim",
    "MaskedEMAAdamW": "epi_kernels.optim",
    "enable_gradient_release": "epi_kernels.optim.release",
    "load_isolation": "epi_kernels.optim.exchange",
    "save_isolation": "epi_kernels.optim.exchange",
}

if TYPE_CHECKING:
    from epi_kernels.optim import IsolationReport, MaskedEMAAdamW
    from epi_kernels.optim.exchange import load_isolation, save_isolation
    from epi_kernels.optim.release import enable_gradient_release
    from epi_kernels.policies.schedule import AdaptiveInterval, AdaptiveRatio


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'epi_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
