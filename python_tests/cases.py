"""Named cases, and how one case becomes torch parameters beside the oracle's run of the same numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from python_tests import oracle
from python_tests.oracle import Hyper, Settings

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
LAYOUTS = ("contiguous", "transposed", "strided", "unaligned")

# Sizes around every width a kernel may have: none, one, a byte's bits, a vector, two vectors, a small block.
SHAPES = {
    "zero-dim": (),
    "empty": (0,),
    "empty-matrix": (3, 0),
    "one": (1,),
    "seven": (7,),
    "byte": (8,),
    "nine": (9,),
    "vector-1": (15,),
    "vector": (16,),
    "vector+1": (17,),
    "odd-matrix": (5, 13),
    "cube": (3, 4, 5),
    "block-1": (255,),
    "block": (256,),
    "block+1": (257,),
    "several-blocks": (33, 67),
}


@dataclass(frozen=True)
class Spec:
    """One parameter."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"


@dataclass(frozen=True)
class Case:
    """Groups of (hyper-parameters, parameters), the global settings, and the seed of all values."""

    groups: tuple[tuple[Hyper, tuple[Spec, ...]], ...]
    settings: Settings = field(default_factory=Settings)
    named: bool = True
    seed: int = 0

    @property
    def specs(self) -> list[Spec]:
        return [spec for _, specs in self.groups for spec in specs]


def case(*specs: Spec, hyper: Hyper | None = None, named: bool = True, seed: int = 0, **settings) -> Case:
    """A case of one group."""
    return Case(((hyper or Hyper(), specs),), Settings(**settings), named, seed)


def half(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that `dtype` can hold."""
    values = np.asarray(values, oracle.FLOAT_DTYPES[dtype])
    return oracle.round_bf16(values).reshape(values.shape) if dtype == "bfloat16" else values


def lay_out(
    values: np.ndarray, dtype: str, layout: str, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tensor with these logical values, the buffer it lies in, NaN wherever the tensor is not)."""
    shape = values.shape
    if layout == "transposed" and shape:
        buffer = torch.full(shape[::-1], math.nan, dtype=TORCH_DTYPES[dtype], device=device)
        tensor = buffer.permute(*reversed(range(len(shape))))
    elif layout == "strided" and shape:
        buffer = torch.full(
            (*shape[:-1], 2 * shape[-1] + 1), math.nan, dtype=TORCH_DTYPES[dtype], device=device
        )
        tensor = buffer[..., 1::2]
    elif layout == "unaligned":
        buffer = torch.full((math.prod(shape) + 2,), math.nan, dtype=TORCH_DTYPES[dtype], device=device)
        tensor = buffer[1:-1].view(shape)
    else:
        buffer = torch.full(shape, math.nan, dtype=TORCH_DTYPES[dtype], device=device)
        tensor = buffer
    tensor.copy_(torch.from_numpy(np.array(values)))
    return tensor, buffer


def gradient(rng: np.random.Generator, n: int, kind: str, dtype: str) -> np.ndarray:
    """[n] values of a kind that hurts somewhere: tiny and huge squares, ties, zeros, non-finite."""
    normal = rng.standard_normal(n)
    values = {
        "normal": normal,
        "small": normal * 1e-4,
        "tiny": normal * 1e-21,  # squares are denormal in float32
        "huge": normal * 1e15,
        "ties": rng.choice([0.0, 0.5, -0.5, 1.0], n),
        "sparse": normal * (rng.random(n) < 0.1),
        "zero": np.zeros(n),
        "spread": normal * 10.0 ** rng.integers(-12, 4, n),
        "nonfinite": np.where(rng.random(n) < 0.1, rng.choice([np.inf, -np.inf, np.nan], n), normal),
    }[kind]
    return half(values, dtype)


GRADIENT_KINDS = ("normal", "small", "tiny", "huge", "ties", "sparse", "zero", "spread", "nonfinite")


def optimizer_arguments(settings: Settings) -> dict:
    """The oracle's settings as arguments of MaskedEMAAdamW."""
    arguments = {name: getattr(settings, name) for name in asdict(settings)}
    for name in ("importance_dtype", "state_dtype"):
        arguments[name] = TORCH_DTYPES.get(arguments[name], arguments[name])
    return arguments


# --- named cases --------------------------------------------------------------------------------------------

_ALL_SHAPES = tuple(Spec(shape) for shape in SHAPES.values())
_MIXED = (
    Spec((5, 13)),
    Spec((33, 17), "bfloat16", "transposed", "transposed"),
    Spec((257,), "float32", "unaligned", "unaligned"),
    Spec((3, 4, 5), "bfloat16", "strided"),
    Spec((), "bfloat16"),
    Spec((0,)),
    Spec((7,), "float32", "strided", "strided"),
    Spec((70,), "bfloat16", "unaligned", "unaligned"),
)
_LARGE = (  # from 4,096 elements on states may be 8-bit
    Spec((64, 64)),
    Spec((4097,), "bfloat16", "unaligned", "unaligned"),
    Spec((77, 65), "bfloat16", "transposed", "transposed"),
    Spec((4095,)),
    Spec((9,), "bfloat16"),
)
_SOON = {"isolation_ratio": 0.1, "mask_interval": 2, "mask_warmup": 1}

CASES = {
    "every-shape-float32": case(*_ALL_SHAPES, **_SOON),
    "every-shape-bfloat16": case(*(Spec(s, "bfloat16") for s in SHAPES.values()), **_SOON),
    "unnamed": case(*_MIXED, named=False, **_SOON),
    "mixed-layouts": case(*_MIXED, **_SOON),
    "mixed-nearest": case(*_MIXED, stochastic_rounding=False, **_SOON),
    "float32-weights-bfloat16-state": case(Spec((33, 17)), Spec((9,)), state_dtype="bfloat16", **_SOON),
    "bfloat16-weights-float32-state": case(*_MIXED, state_dtype="float32", **_SOON),
    "master-32": case(*_MIXED, master_weight_bits=32, **_SOON),
    "master-24": case(*_MIXED, master_weight_bits=24, **_SOON),
    "master-24-nearest": case(*_MIXED, master_weight_bits=24, stochastic_rounding=False, **_SOON),
    "master-24-float32-state": case(*_MIXED, master_weight_bits=24, state_dtype="float32", **_SOON),
    "master-32-own": case(*_MIXED, hyper=Hyper(importance_beta=0.9), master_weight_bits=32, **_SOON),
    "master-24-int8": case(*_LARGE, state_dtype="int8", master_weight_bits=24, **_SOON),
    "master-32-int8-own": case(
        *_LARGE,
        hyper=Hyper(importance_beta=0.9),
        state_dtype="int8",
        importance_dtype="int8",
        master_weight_bits=32,
        **_SOON,
    ),
    "own-importance": case(*_MIXED, hyper=Hyper(importance_beta=0.9), **_SOON),
    "own-bfloat16": case(*_MIXED, hyper=Hyper(importance_beta=0.5), importance_dtype="bfloat16", **_SOON),
    "importance-beta-0": case(Spec((257,)), hyper=Hyper(importance_beta=0.0), **_SOON),
    "int8": case(*_LARGE, state_dtype="int8", **_SOON),
    "int8-nearest": case(*_LARGE, state_dtype="int8", stochastic_rounding=False, **_SOON),
    "int8-own": case(
        *_LARGE, hyper=Hyper(importance_beta=0.9), state_dtype="int8", importance_dtype="int8", **_SOON
    ),
    "int8-importance-alone": case(
        *_LARGE, hyper=Hyper(importance_beta=0.9), importance_dtype="int8", **_SOON
    ),
    "int8-layer-hysteresis": case(*_LARGE, state_dtype="int8", scope="layer", hysteresis=0.3, **_SOON),
    "int4": case(*_LARGE, state_dtype="int4", **_SOON),
    "int4-nearest": case(*_LARGE, state_dtype="int4", stochastic_rounding=False, **_SOON),
    "int4-layer-hysteresis": case(
        *_LARGE, hyper=Hyper(betas=(0.8, 0.95)), state_dtype="int4", scope="layer", hysteresis=0.3, **_SOON
    ),
    "master-24-int4": case(*_LARGE, state_dtype="int4", master_weight_bits=24, **_SOON),
    "none": case(*_MIXED, normalization="none", **_SOON),
    "layer-scope": case(*_MIXED, scope="layer", **_SOON),
    "layer-scope-none": case(*_MIXED, scope="layer", normalization="none", **_SOON),
    "hysteresis": case(*_MIXED, hysteresis=0.3, **_SOON),
    "hysteresis-layer-none": case(*_MIXED, hysteresis=0.9, scope="layer", normalization="none", **_SOON),
    "layer-key": case(*_MIXED, layer_key=lambda name: int(name[1:]) % 3, **_SOON),
    "layer-key-scope": case(*_MIXED, layer_key=lambda name: int(name[1:]) // 3, scope="layer", **_SOON),
    "two-groups": Case(
        (
            (Hyper(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1), _MIXED[:4]),
            (Hyper(maximize=True, eps=1e-3, isolate=False), _MIXED[4:6]),
            (Hyper(lr=0.0, betas=(0.0, 0.0), weight_decay=0.0, importance_beta=0.5), _MIXED[6:]),
        ),
        Settings(**_SOON),
    ),
    "high-ratio": case(*_MIXED, isolation_ratio=0.97, mask_interval=1),
    "seed": case(*_MIXED, **_SOON, seed=7),
    "plain-adamw": case(*_MIXED, isolation_ratio=0.0),
}
