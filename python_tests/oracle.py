"""A whole training run in numpy, written from the contract alone; nothing here imports epi_kernels or torch.

Elements are flat logical row-major arrays of float32 (float64 for float64 weights), whatever they are stored
as: a value stored as bfloat16 is a float32 whose low 16 bits are zero. numpy evaluates one IEEE-rounded
operation per expression node and never contracts, which is what the contract asks of every backend.
The oracle sorts (np.partition); the package must count.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

from python_tests import oracle_codec, oracle_master, oracle_nibbles

F32 = np.float32
FLOAT_DTYPES = {
    "float32": np.float32,
    "bfloat16": np.float32,
    "int8": np.float32,
    "int4": np.float32,
    "float64": np.float64,
}  # dtype it is computed in


# --- rounding -----------------------------------------------------------------------------------------------


def mix(x: np.ndarray) -> np.ndarray:
    """lowbias32 over uint32."""
    x = x.astype(np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def random_words(seed: int, t: int, ident: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two 32-bit words per element; `index` is the logical row-major position, uint64 [n]."""
    u32 = lambda value: np.asarray([value & 0xFFFFFFFF], dtype=np.uint32)  # noqa: E731
    key = mix(mix(mix(u32(seed)) ^ u32(t)) ^ u32(ident))
    key = mix(key ^ (index >> np.uint64(32)).astype(np.uint32))
    w0 = mix((index & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ key)
    return w0, mix(w0 + np.uint32(0x9E3779B9))


def round_bf16(x: np.ndarray, r16: np.ndarray | None = None) -> np.ndarray:
    """float32 [n] to the values bfloat16 can hold: to nearest even, or stochastically with 16 bits each."""
    x = np.ascontiguousarray(x, dtype=F32)
    bits = x.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    out = nearest if r16 is None else np.where(np.isfinite(x), bits + r16.astype(np.uint32), nearest)
    out = out & np.uint32(0xFFFF0000)
    # A NaN keeps being one: the carry above could have turned its payload into something else.
    return np.where(np.isnan(x), F32(np.nan), out.astype(np.uint32).view(F32)).astype(F32)


def power(base: float, exponent: int) -> float:
    """base**exponent in float64 by multiplications only, least significant bit of the exponent first."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


# --- what a run is made of ----------------------------------------------------------------------------------


@dataclass
class Settings:
    """The arguments that are global."""

    isolation_ratio: float = 0.01
    mask_interval: int | None = 100
    mask_warmup: int | None = None
    importance_dtype: str = "float32"
    normalization: str = "minmax"
    scope: str = "global"
    layer_key: Callable[[str], Hashable] | None = None
    hysteresis: float = 0.0
    state_dtype: str | None = None
    master_weight_bits: int = 16
    stochastic_rounding: bool | None = None
    seed: int = 0
    isolation_granularity: str = "element"


@dataclass
class Hyper:
    """The arguments a group may carry."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    isolate: bool = True
    importance_beta: float | None = None

    @property
    def shared(self) -> bool:
        return self.importance_beta is None or self.importance_beta == self.betas[1]


@dataclass
class Param:
    theta: np.ndarray  # [n]
    dtype: str
    hyper: Hyper
    name: str | None = None
    step: int = 0  # t
    master: np.ndarray | None = None  # [n]; what theta is the nearest bfloat16 to, where more is kept
    exp_avg: np.ndarray | None = None  # [n]; None until the first step with a gradient
    exp_avg_sq: np.ndarray | None = None
    importance: np.ndarray | None = None  # [n], own importance only
    mantissas: np.ndarray | None = None  # [blocks] of exp_avg_sq's scales, where it is 4-bit
    mask: np.ndarray = field(default=None)  # [n] bool
    persistent: np.ndarray | None = None
    stateless: np.ndarray | None = None  # [n] bool: moments are not kept, and so 0
    # Logical positions [n] uint64 of these elements, where they are a few of a tensor too large to hold.
    index: np.ndarray | None = None

    def __post_init__(self):
        self.theta = np.array(self.theta, dtype=FLOAT_DTYPES[self.dtype]).reshape(-1)
        if self.mask is None:
            self.mask = np.zeros(self.theta.size, dtype=bool)

    @property
    def u(self) -> np.ndarray:
        """Importance as it is stored; zeros where there is no state."""
        u = self.exp_avg_sq if self.hyper.shared else self.importance
        return np.zeros(self.theta.size, dtype=F32) if u is None else u


@dataclass
class Row:
    name: str
    elements: int = 0
    isolated: int = 0
    entered: int = 0
    released: int = 0
    nonfinite: int = 0
    union: int = 0
    kept: int = 0

    @property
    def jaccard(self) -> float:
        return self.kept / self.union if self.union else 1.0

    def count(self, old: np.ndarray, new: np.ndarray, bad: np.ndarray) -> None:
        self.elements += new.size
        self.isolated += int(new.sum())
        self.entered += int((new & ~old).sum())
        self.released += int((old & ~new).sum())
        self.union += int((new | old).sum())
        self.kept += int((new & old).sum())
        self.nonfinite += int(bad.sum())


@dataclass
class Report(Row):
    step: int = 0
    ratio: float = 0.0
    threshold: float | dict = math.inf
    ties: int = 0
    layers: list[Row] = field(default_factory=list)
    # Per parameter, the scores selection saw: lets a test leave out what a last bit may decide.
    scores: list[np.ndarray] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)


class Run:
    """Parameters in the order of the optimizer's groups, and what step() and a refresh do to them."""

    def __init__(self, params: list[Param], settings: Settings):
        self.params = params
        self.settings = settings
        self.T = 0
        self.report: Report | None = None

    # --- one step -------------------------------------------------------------------------------------------

    def step(
        self, grads: list[np.ndarray | None], *, grad_scale: float | None = None, found_inf: bool = False
    ):
        """grads [n] per parameter, None where there is none. Returns the gradients as written back."""
        if found_inf:
            return grads
        written = list(grads)
        for position, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is not None:
                written[position] = self._step_param(position, p, grad, grad_scale)
        self.T += 1
        if self.refresh_due():
            self.refresh()
        return written

    def _step_param(self, position: int, p: Param, grad: np.ndarray, grad_scale: float | None) -> np.ndarray:
        h, s = p.hyper, self.settings
        real = FLOAT_DTYPES[p.dtype]
        n = p.theta.size
        if p.exp_avg is None:
            state_real = FLOAT_DTYPES[self._state_dtype(p, s.state_dtype)]
            p.exp_avg, p.exp_avg_sq = np.zeros(n, state_real), np.zeros(n, state_real)
            if not h.shared:
                p.importance = np.zeros(n, F32)
            if p.dtype == "bfloat16" and s.master_weight_bits > 16:
                p.master = p.theta
        p.step += 1
        t = p.step
        beta1, beta2 = h.betas
        bias1, root2 = 1.0 - power(beta1, t), math.sqrt(1.0 - power(beta2, t))

        with np.errstate(all="ignore"):
            g = np.asarray(grad, dtype=real).reshape(-1)
            if grad_scale is not None:
                g = g * real(F32(1.0 / float(grad_scale)))
            written = g if p.dtype != "bfloat16" else round_bf16(g)
            if h.maximize:
                g = -g
            gg = g * g
            m = real(beta1) * p.exp_avg.astype(real) + real(1 - beta1) * g
            v = real(beta2) * p.exp_avg_sq.astype(real) + real(1 - beta2) * gg
            if not h.shared:
                u = real(h.importance_beta) * p.importance.astype(real) + real(1 - h.importance_beta) * gg
            denom = np.sqrt(v) + real(h.eps * root2)
            theta = p.theta if p.master is None else p.master
            new = real(1 - h.lr * h.weight_decay) * theta - real(h.lr * root2 / bias1) * (m / denom)

        ident = position if p.name is None else zlib.crc32(p.name.encode())
        w0, w1 = random_words(s.seed, t, ident, np.arange(n, dtype=np.uint64) if p.index is None else p.index)
        low, high = (lambda w: w & np.uint32(0xFFFF)), (lambda w: w >> np.uint32(16))
        state_dtype = self._state_dtype(p, s.state_dtype)
        if p.master is None:
            p.theta = np.where(p.mask, p.theta, self._store(new, p.dtype, low(w0)))
        else:
            random = None if s.stochastic_rounding is False else low(w0)
            new = oracle_master.narrowed(new, s.master_weight_bits, random)
            p.master = np.where(p.mask, p.master, new)
            p.theta = np.where(p.mask, p.theta, oracle_master.nearest_bfloat16(new))
        if state_dtype == "int4":
            self._store_nibbles(p, m, v, high(w0), w1 & np.uint32(0x7FFFFF))
        else:
            p.exp_avg = self._store(m, state_dtype, high(w0), signed=True)
            p.exp_avg_sq = self._store(v, state_dtype, low(w1))
        if not h.shared:
            p.importance = self._store(u, self._state_dtype(p, s.importance_dtype), high(w1))
        if p.stateless is not None:
            for moment in (p.exp_avg, p.exp_avg_sq, *([] if h.shared else [p.importance])):
                moment[p.stateless] = 0
        return written

    @staticmethod
    def _state_dtype(p: Param, dtype: str | None) -> str:
        """Of a state for which the settings say `dtype`; small tensors keep float32."""
        if dtype in ("int8", "int4"):
            return dtype if p.theta.size >= oracle_codec.MIN_ELEMENTS else "float32"
        return dtype or p.dtype

    def _store_nibbles(
        self, p: Param, m: np.ndarray, v: np.ndarray, r_m: np.ndarray, r_v: np.ndarray
    ) -> None:
        if self.settings.stochastic_rounding is False:
            r_m = r_v = None
        if p.mantissas is None:
            p.mantissas = np.zeros(-(-m.size // oracle_nibbles.BLOCK), F32)
        most = oracle_nibbles.bound(*p.hyper.betas)
        p.exp_avg, p.exp_avg_sq, p.mantissas = oracle_nibbles.stored(
            m.astype(F32), v.astype(F32), p.mantissas, r_m, r_v, most
        )

    def _store(self, x: np.ndarray, dtype: str, r16: np.ndarray, *, signed: bool = False) -> np.ndarray:
        if dtype == "int8":
            x = x.astype(F32)
            return oracle_codec.stored(
                x, None if self.settings.stochastic_rounding is False else r16, signed=signed
            )
        if dtype != "bfloat16":
            return x.astype(FLOAT_DTYPES[dtype])
        return round_bf16(x, None if self.settings.stochastic_rounding is False else r16)

    # --- a refresh ------------------------------------------------------------------------------------------

    def refresh_due(self) -> bool:
        s = self.settings
        if s.mask_interval is None or s.isolation_ratio == 0:
            return False
        warmup = s.mask_interval if s.mask_warmup is None else s.mask_warmup
        return self.T >= warmup and (self.T - warmup) % s.mask_interval == 0

    def layer_of(self, position: int) -> tuple[Hashable, str]:
        """(what groups the elements, what the report calls it)."""
        p = self.params[position]
        if self.settings.layer_key is not None:
            key = self.settings.layer_key(p.name)
            return ("key", key), str(key)
        return ("param", position), p.name if p.name is not None else f"param_{position}"

    def _scores(self, layer: list[int], u: dict[int, np.ndarray]) -> tuple[dict[int, np.ndarray], bool]:
        """Scores of one layer's elements (NaN where u is not finite), and whether std > 0 (zscore)."""
        s = self.settings
        every = np.concatenate([u[i] for i in layer])
        every = every[np.isfinite(every)]
        spread = True
        scores = {}
        with np.errstate(all="ignore"):
            if s.normalization == "minmax":
                low, high = (every.min(), every.max()) if every.size else (F32(0), F32(0))
                scores = {i: (u[i] - low) / (high - low) if high != low else u[i] * 0 for i in layer}
            elif s.normalization == "zscore":
                wide = every.astype(np.float64)
                spread = bool(every.size) and not np.all(every == every[0])
                mean, std = (wide.mean(), wide.std()) if spread else (0.0, 1.0)
                scores = {i: (u[i].astype(np.float64) - mean) / std * spread for i in layer}
            else:
                scores = {i: u[i].copy() for i in layer}
            if s.hysteresis > 0:
                keep = u[layer[0]].dtype.type(F32(1.0 - s.hysteresis))
                scores = {i: np.where(self.params[i].mask, x / keep, x) for i, x in scores.items()}
        return {i: np.where(np.isfinite(u[i]), x, np.nan) for i, x in scores.items()}, spread

    def refresh(self) -> Report:
        s = self.settings
        eligible = [i for i, p in enumerate(self.params) if p.hyper.isolate and p.theta.size]
        u = {i: self.params[i].u for i in eligible}
        layers: dict[Hashable, list[int]] = {}
        for i in eligible:
            layers.setdefault(self.layer_of(i)[0], []).append(i)
        scores, spread = {}, {}
        for layer in layers.values():
            of_layer, has_spread = self._scores(layer, u)
            scores |= of_layer
            spread |= dict.fromkeys(layer, has_spread)

        report = Report(name="", step=self.T, ratio=s.isolation_ratio)
        sets = [eligible] if s.scope == "global" else list(layers.values())
        threshold = {}
        for members in sets:
            n = sum(self.params[i].theta.size for i in members)
            every = np.concatenate([scores[i] for i in members]) if members else np.zeros(0, F32)
            bound, ties = kth_largest(every[~np.isnan(every)], math.floor(s.isolation_ratio * n))
            threshold |= dict.fromkeys(members, bound)
            report.ties += ties
        if s.scope == "global":
            report.threshold = threshold[eligible[0]] if eligible else math.inf
        else:
            report.threshold = {self.layer_of(members[0])[1]: threshold[members[0]] for members in sets}

        rows: dict[Hashable, Row] = {}
        for i, p in enumerate(self.params):
            new, bad = np.zeros(p.theta.size, bool), np.zeros(p.theta.size, bool)
            if i in scores:
                bad = ~np.isfinite(u[i])
                with np.errstate(invalid="ignore"):
                    new = (scores[i] >= threshold[i]) & (u[i] > 0) & ~bad
                    new &= (scores[i] > 0) if s.normalization != "zscore" else spread[i]
            if p.persistent is not None:
                new = new | p.persistent
            key, name = self.layer_of(i)
            if p.theta.size:  # what is not eligible is no part of a layer: it gets a row of its own
                rows.setdefault((key, i in scores), Row(name)).count(p.mask, new, bad)
                report.count(p.mask, new, bad)
            p.mask = new
            report.scores.append(scores.get(i))
            report.thresholds.append(threshold.get(i))
        report.layers = [row for (_, takes_part), row in rows.items() if takes_part or row.union]
        self.report = report
        return report


def kth_largest(scores: np.ndarray, k: int) -> tuple[float, int]:
    """The k-th largest of finite-u scores and how many more than k reach it."""
    if k == 0 or scores.size == 0:
        return math.inf, 0
    place = max(scores.size - k, 0)  # fewer scores than k: the smallest
    bound = np.partition(scores, place)[place]
    return float(bound), max(0, int((scores >= bound).sum()) - k)


def pack(mask: np.ndarray) -> np.ndarray:
    """bool [n] to the packed form: uint8, least significant bit first, padding zero."""
    return np.packbits(np.asarray(mask, bool).reshape(-1), bitorder="little")
