"""Which backend steps which parameters, and why the others were passed over."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch

from epi_kernels.backends.protocol import Backend

# auto tries them in this order; the reference is always there
_MODULES = {
    "triton": ("epi_kernels.backends.triton", "TritonBackend"),
    "cuda": ("epi_kernels.backends.cuda", "CudaBackend"),
    "cpu": ("epi_kernels.backends.cpu", "CpuBackend"),
    "reference": ("epi_kernels.backends.reference", "ReferenceBackend"),
}
NAMES = tuple(_MODULES)


class Choice(NamedTuple):
    backend: Backend
    reason: str


@functools.cache
def load(name: str) -> Backend | str:
    """The backend, or why it cannot run on this machine. Backend constructors raise ImportError to say so."""
    module, class_name = _MODULES[name]
    try:
        return getattr(importlib.import_module(module), class_name)()
    except ImportError as error:
        return str(error)


def forget() -> None:
    """Loads and chooses anew, because an environment variable that backends read has changed."""
    load.cache_clear()
    choose.cache_clear()


def devices() -> list[torch.device]:
    """The kinds of device that parameters can lie on here."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def available() -> list[tuple[str, bool, str]]:
    """(name, can run here, reason) of every backend, in the order ``auto`` tries them."""
    rows = []
    for name in NAMES:
        backend = load(name)
        if isinstance(backend, str):
            rows.append((name, False, backend))
            continue
        refusals = [backend.refuses(device, torch.float32) for device in devices()]
        usable = any(refusal is None for refusal in refusals)
        description = getattr(backend, "description", "plain PyTorch, always there")
        rows.append((name, usable, description if usable else f"{description}: {refusals[-1]}"))
    return rows


@functools.cache
def choose(requested: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for parameters of this device and dtype.

    Raises:
        RuntimeError: a backend asked for by name cannot run, with the reason; or, for ``auto``, none can.
    """
    passed_over = []
    for name in NAMES if requested == "auto" else (requested,):
        backend = load(name)
        refusal = backend if isinstance(backend, str) else backend.refuses(device, dtype)
        if refusal is None and requested == "auto":
            # a backend may be able to run and yet not be one to choose unasked: an interpreter, say
            refusal = getattr(backend, "only_by_name", lambda device: None)(device)
        if refusal is None:
            assert not isinstance(backend, str)
            reason = "asked for by name" if requested != "auto" else "; ".join(passed_over) or "first choice"
            return Choice(backend, reason)
        passed_over.append(f"{name}: {refusal}")
    wanted = "no backend" if requested == "auto" else f"backend={requested!r} is not able to run"
    raise RuntimeError(f"{wanted} for {dtype} parameters on {device}: " + "; ".join(passed_over))
