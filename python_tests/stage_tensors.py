"""Tensors for the tests of one stage: parameters with their state in every dtype, some with masks, on any device."""

from __future__ import annotations

import dataclasses
import math

import torch

from epi_kernels.reference import codec, master, nibbles
from epi_kernels.reference.scalars import HyperParameters
from epi_kernels.reference.tensors import ParamTensors

CPU = torch.device("cpu")
# uint8 holds the codes of reference/codec.py; uint4 stands for those of reference/nibbles.py
F32, BF16, INT8, INT4 = torch.float32, torch.bfloat16, torch.uint8, torch.uint4
DTYPES = [(p, s, u) for p in (F32, BF16) for s in (F32, BF16) for u in (None, F32, BF16)]
DTYPES_INT8 = [
    (p, s, u)
    for p in (F32, BF16)
    for s in (F32, BF16, INT8)
    for u in (None, F32, BF16, INT8)
    if INT8 in (s, u)
]
DTYPES_CORRECTED = [
    (BF16, s, u, correction)
    for s, u in ((F32, None), (BF16, F32), (INT8, INT8))
    for correction in master.CORRECTION_DTYPES.values()
]
DTYPES_INT4 = [
    (F32, INT4, None),
    (BF16, INT4, None),
    *((BF16, INT4, None, correction) for correction in master.CORRECTION_DTYPES.values()),
]
# around a chunk of the cuda backend, with one and with no element
SIZES = (5, 4099, 0, 8192, 1, 77, 300)


def names(dtypes: tuple[torch.dtype | None, ...]) -> str:
    """A test's id: param-state-importance, and the bits of a correction beside the weights."""
    words = {None: "shared", F32: "f32", BF16: "bf16", INT8: "int8", INT4: "int4"}
    words |= {torch.int8: "8", torch.int16: "16"}
    return "-".join(words[dtype] for dtype in dtypes)


def params(
    sizes: tuple[int, ...],
    param: torch.dtype,
    state: torch.dtype,
    importance: torch.dtype | None,
    correction: torch.dtype | None = None,
    *,
    shift: int = 0,
) -> list[ParamTensors]:
    """On the CPU, some weights with corrections that are not theirs. ``shift``: elements that every tensor lies behind its allocation's start."""
    generator = torch.Generator().manual_seed(len(sizes) + shift)

    def make(n: int, dtype: torch.dtype, positive: bool = False) -> torch.Tensor:
        values = torch.randn(n + shift, generator=generator).to(dtype)[shift:]
        return values.abs_() if positive else values

    def make_state(n: int, dtype: torch.dtype, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if dtype != INT8:
            return make(n, dtype, positive=not signed), None
        values = make(n, F32, positive=not signed) * 10.0 ** torch.randint(-9, 3, (n,), generator=generator)
        codes, scales = codec.encode(values, None, signed=signed)
        return torch.cat([codes.new_zeros(shift), codes])[shift:], torch.cat(
            [scales.new_zeros(shift), scales]
        )[shift:]

    def make_nibbles(n: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        spread = 10.0 ** torch.randint(-7, 3, (n,), generator=generator)
        second = nibbles.encode_exp_avg_sq(make(n, F32, positive=True) * spread, None, None)
        first = nibbles.encode_exp_avg(make(n, F32) * spread.sqrt(), None, second)
        made = []
        for codes, scales in (first, second):
            packed = nibbles.pack(codes)
            packed, scales = (torch.cat([x.new_zeros(shift), x])[shift:] for x in (packed, scales))
            made.append((packed, scales))
        return tuple(made)

    beta_u = 0.99 if importance is None else 0.5
    hyper = HyperParameters(lr=1e-2, beta1=0.9, beta2=0.99, beta_u=beta_u, eps=1e-8, weight_decay=0.1)
    result = []
    for row, n in enumerate(sizes):
        mask = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=generator)
        if n % 8:
            mask[-1] &= (1 << n % 8) - 1
        if state == INT4:
            (m, m_scale), (v, v_scale) = make_nibbles(n)
        else:
            (m, m_scale), (v, v_scale) = make_state(n, state, signed=True), make_state(n, state, signed=False)
        u, u_scale = (None, None) if importance is None else make_state(n, importance, signed=False)
        weights, corrections = make(n, param), None
        if correction is not None:
            weights[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.3e38])[:n]
            limits = torch.iinfo(correction)
            corrections = torch.randint(
                limits.min, limits.max + 1, (n + shift,), dtype=correction, generator=generator
            )[shift:]
        result.append(
            ParamTensors(
                param=weights,
                weight_correction=corrections,
                grad=make(n, param),
                exp_avg=m,
                exp_avg_sq=v,
                importance=u,
                exp_avg_scale=m_scale,
                exp_avg_sq_scale=v_scale,
                importance_scale=u_scale,
                isolation_mask=mask if row % 3 else None,
                persistent_mask=None if row % 2 else mask >> 1,
                layer=row % 3 - 1 if row else 0,
                step=torch.tensor(2.0 + row % 2),
                hyper=hyper,
                maximize=row % 2 == 1,
                rng_id=12345 + row,
                index_offset=[0, 2**32 - 3008, 2**33 + 64][row % 3],  # whole blocks of 64,
            )
        )
    return result


def refresh_params(dtype: torch.dtype, shift: int) -> list[ParamTensors]:
    """Three layers, every row with a mask, non-finite and zero importances among the rest."""
    tensors = params(SIZES, F32 if dtype in (INT8, INT4) else dtype, dtype, None, shift=shift)
    for row, t in enumerate(tensors):
        t.layer = row % 3
        if t.isolation_mask is None:
            t.isolation_mask = torch.zeros((t.param.numel() + 7) // 8, dtype=torch.uint8)
        if t.has_nibbles:
            t.exp_avg_sq_scale[1:2] = math.inf
            t.exp_avg_sq[32:64] = 255
            t.exp_avg_sq[100:102] = 0
        elif t.exp_avg_sq_scale is not None:
            t.exp_avg_sq_scale[1:2] = codec.NONFINITE
            t.exp_avg_sq[64:128] = 255
            t.exp_avg_sq[200:204] = 0
        elif t.exp_avg_sq.numel() > 4:
            t.exp_avg_sq[:4] = torch.tensor([math.inf, math.nan, 0.0, -math.inf], dtype=dtype)
    return nonempty(tensors)


def nonempty(tensors: list[ParamTensors]) -> list[ParamTensors]:
    """The reference's minimum wants an element."""
    return [t for t in tensors if t.param.numel()]


def copies(tensors: list[ParamTensors], device: torch.device, shift: int = 0) -> list[ParamTensors]:
    """On a device; every tensor but masks ``shift`` elements behind its allocation's start there too."""

    def copy(name: str, value):
        if not isinstance(value, torch.Tensor):
            return value
        behind = 0 if name.endswith("mask") else shift
        buffer = torch.empty(value.numel() + behind, dtype=value.dtype, device=device)
        return buffer[behind:].copy_(value)

    fields = [field.name for field in dataclasses.fields(ParamTensors)]
    return [
        dataclasses.replace(t, **{name: copy(name, getattr(t, name)) for name in fields}) for t in tensors
    ]


def to(value, device: torch.device):
    """A dataclass of tensors, on another device."""
    moved = {
        field.name: getattr(value, field.name).to(device, copy=True)
        for field in dataclasses.fields(value)
        if isinstance(getattr(value, field.name), torch.Tensor)
    }
    return dataclasses.replace(value, **moved)
