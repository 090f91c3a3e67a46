"""CUDA graphs: while one is captured kernels are noted, not run, and nothing may wait for the device."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether the current stream is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
