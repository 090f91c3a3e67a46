"""Arguments: what is allowed, checked before any state exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels.backends import dispatch
from epi_kernels.distributed import shards
from epi_kernels.policies.checks import check_interval, check_ratio
from epi_kernels.policies.checks import is_int as _is_int
from epi_kernels.policies.checks import is_number as _is_number
from epi_kernels.policies.checks import require as _require
from epi_kernels.policies.layers import LayerKey
from epi_kernels.policies.schedule import AdaptiveInterval, AdaptiveRatio, IntervalSchedule, RatioSchedule

NORMALIZATIONS = ("minmax", "zscore", "none")
SCOPES = ("global", "layer")
BACKENDS = ("auto", *dispatch.NAMES)
# what stands for codes in IsolationConfig: states of 8-bit ones have this dtype, 4-bit ones are packed into bytes
INT8, INT4 = torch.uint8, torch.uint4  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
_CODES = {"int8": INT8, "int4": INT4}
STATE_DTYPES = (None, torch.float32, torch.bfloat16, "int8", "int4")
IMPORTANCE_DTYPES = (torch.float32, torch.bfloat16, "int8")
MASTER_WEIGHT_BITS = (16, 24, 32)
OFFLOADS = (None, "cpu")
HOST_BACKENDS = ("cpu", "reference")
GRANULARITIES = ("element", "row", "block")

# what a param group may set; everything else the constructor takes is one value for the whole optimizer
GROUP_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize", "isolate", "importance_beta")
GLOBAL_OPTIONS = (
    "amsgrad",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "isolation_ratio",
    "mask_interval",
    "mask_warmup",
    "importance_dtype",
    "normalization",
    "scope",
    "layer_key",
    "hysteresis",
    "state_dtype",
    "master_weight_bits",
    "stochastic_rounding",
    "seed",
    "backend",
    "offload",
    "isolation_granularity",
)


@dataclass(frozen=True)
class IsolationConfig:
    """The options that hold for the whole optimizer. INT8 and INT4 stand for codes."""

    isolation_ratio: float  # where a schedule sets it, its value at T = 0; mask_interval likewise
    mask_interval: int | None
    mask_warmup: int | None
    importance_dtype: torch.dtype
    normalization: str
    scope: str
    layer_key: LayerKey | None
    hysteresis: float
    state_dtype: torch.dtype | None
    master_weight_bits: int
    stochastic_rounding: bool
    seed: int
    backend: str
    capturable: bool = False
    offload: str | None = None
    isolation_granularity: str = "element"
    ratio_schedule: RatioSchedule | None = None
    interval_schedule: IntervalSchedule | None = None

    @property
    def isolates(self) -> bool:
        """Whether anything may ever be selected."""
        return self.isolation_ratio > 0 or self.ratio_schedule is not None

    @property
    def adapts(self) -> bool:
        """Whether a schedule follows the drift of the masks."""
        return isinstance(self.ratio_schedule, AdaptiveRatio) or isinstance(
            self.interval_schedule, AdaptiveInterval
        )


def _unit_interval(name: str, value: Any) -> None:
    _require(_is_number(value) and 0.0 <= value < 1.0, name, value, "a number in [0, 1)")


def _choice(name: str, value: Any, allowed: tuple) -> None:
    _require(
        any(value is option or (isinstance(value, str) and value == option) for option in allowed),
        name,
        value,
        "one of " + ", ".join(repr(option) for option in allowed),
    )


def check_group_options(options: dict[str, Any]) -> None:
    """Validates the options of one param group, or the constructor's defaults for them."""
    if "lr" in options:
        lr = options["lr"]
        if isinstance(lr, Tensor):
            _require(lr.numel() == 1 and not lr.is_complex(), "lr", lr, "a float or a tensor of one element")
            lr = float(lr)
        _require(
            _is_number(lr) and lr >= 0.0 and math.isfinite(lr), "lr", options["lr"], "a finite number >= 0"
        )
    if "betas" in options:
        betas = options["betas"]
        _require(
            isinstance(betas, (tuple, list)) and len(betas) == 2,
            "betas",
            betas,
            "a pair of numbers in [0, 1)",
        )
        for position, beta in enumerate(betas):
            _unit_interval(f"betas[{position}]", beta)
    for name in ("eps", "weight_decay"):
        if name in options:
            value = options[name]
            ok = _is_number(value) and value >= 0.0 and math.isfinite(value)
            _require(ok, name, value, "a finite number >= 0")
    if options.get("importance_beta") is not None:
        _unit_interval("importance_beta", options["importance_beta"])
    for name in ("maximize", "isolate"):
        if name in options:
            _require(isinstance(options[name], bool), name, options[name], "True or False")


def check_importance(options: Mapping[str, Any], config: IsolationConfig) -> None:
    """Refuses an own importance where states have 4 bits; ``options`` of a whole group."""
    beta, beta2 = options["importance_beta"], options["betas"][1]
    _require(
        config.state_dtype != INT4 or beta is None or beta == beta2,
        "importance_beta",
        beta,
        f"None or beta2 ({beta2!r}) with state_dtype='int4', whose importance is exp_avg_sq (use 'int8' with one of its own)",
    )


def check_torch_options(*, amsgrad: bool, foreach: Any, differentiable: bool, fused: Any) -> None:
    """torch.optim.AdamW's own switches: honoured, or refused with what to use instead."""
    if amsgrad:
        raise ValueError(
            "amsgrad=True is not supported: use amsgrad=False, or torch.optim.AdamW without isolation"
        )
    if differentiable:
        raise ValueError(
            "differentiable=True is not supported: the fused step has no autograd; use torch.optim.AdamW"
        )
    if foreach and fused:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together")


def _ratio(given: float | RatioSchedule) -> tuple[float, RatioSchedule | None]:
    """(p at T = 0, what sets it later)."""
    if isinstance(given, AdaptiveRatio):
        return given.initial, given
    if callable(given):
        return check_ratio("isolation_ratio(0)", given(0)), given
    return check_ratio(
        "isolation_ratio", given, "a number in [0, 1), a callable of T or an AdaptiveRatio"
    ), None


def _interval(given: int | IntervalSchedule | None) -> tuple[int | None, IntervalSchedule | None]:
    """(H at T = 0, what sets it later)."""
    if isinstance(given, AdaptiveInterval):
        return given.initial, given
    if callable(given):
        return check_interval("mask_interval(0)", given(0)), given
    if given is None:
        return None, None
    allowed = "an int >= 1, a callable of T, an AdaptiveInterval, or None for masks that are never refreshed by themselves"
    return check_interval("mask_interval", given, allowed), None


def make_config(
    *,
    isolation_ratio: float | RatioSchedule,
    mask_interval: int | IntervalSchedule | None,
    mask_warmup: int | None,
    importance_dtype: Any,
    normalization: str,
    scope: str,
    layer_key: LayerKey | None,
    hysteresis: float,
    state_dtype: Any,
    master_weight_bits: int,
    stochastic_rounding: bool | None,
    seed: int,
    backend: str,
    capturable: bool,
    offload: str | None,
    isolation_granularity: str,
) -> IsolationConfig:
    """Validates the global options."""
    ratio, ratio_schedule = _ratio(isolation_ratio)
    interval, interval_schedule = _interval(mask_interval)
    _require(
        interval is not None or not isinstance(ratio_schedule, AdaptiveRatio),
        "mask_interval",
        mask_interval,
        "given with an AdaptiveRatio, which follows the refreshes that are due",
    )
    _unit_interval("hysteresis", hysteresis)
    _require(
        mask_warmup is None or (_is_int(mask_warmup) and mask_warmup >= 0),
        "mask_warmup",
        mask_warmup,
        "an int >= 0, or None for mask_interval",
    )
    _choice("importance_dtype", importance_dtype, IMPORTANCE_DTYPES)
    _choice("state_dtype", state_dtype, STATE_DTYPES)
    _require(
        _is_int(master_weight_bits) and master_weight_bits in MASTER_WEIGHT_BITS,
        "master_weight_bits",
        master_weight_bits,
        "one of " + ", ".join(map(str, MASTER_WEIGHT_BITS)),
    )
    _choice("normalization", normalization, NORMALIZATIONS)
    _choice("scope", scope, SCOPES)
    _choice("backend", backend, BACKENDS)
    _choice("offload", offload, OFFLOADS)
    _require(
        not (offload and capturable),
        "offload",
        offload,
        "None with capturable=True (a graph replays kernels, and the host steps what is offloaded)",
    )
    _require(
        not offload or backend in ("auto", *HOST_BACKENDS),
        "backend",
        backend,
        "'auto', 'cpu' or 'reference' with offload='cpu' (the host steps what is offloaded)",
    )
    _choice("isolation_granularity", isolation_granularity, GRANULARITIES)
    _require(
        isolation_granularity == "element" or not (capturable or offload or state_dtype == "int4"),
        "isolation_granularity",
        isolation_granularity,
        "'element' with capturable=True (a graph goes on with the memory that it was captured with), with offload='cpu' and "
        "with state_dtype='int4'",
    )
    _require(layer_key is None or callable(layer_key), "layer_key", layer_key, "None or a callable of a name")
    _require(
        stochastic_rounding is None or isinstance(stochastic_rounding, bool),
        "stochastic_rounding",
        stochastic_rounding,
        "None, True or False",
    )
    _require(_is_int(seed), "seed", seed, "an int")
    _require(
        not (hysteresis > 0 and normalization == "zscore"),
        "hysteresis",
        hysteresis,
        "0 with normalization='zscore' (a z-score may be negative, so dividing it favours nothing)",
    )
    return IsolationConfig(
        isolation_ratio=ratio,
        mask_interval=interval,
        mask_warmup=None if mask_warmup is None else int(mask_warmup),
        importance_dtype=_CODES.get(importance_dtype, importance_dtype),
        normalization=normalization,
        scope=scope,
        layer_key=layer_key,
        hysteresis=float(hysteresis),
        state_dtype=_CODES.get(state_dtype, state_dtype),
        master_weight_bits=int(master_weight_bits),
        stochastic_rounding=stochastic_rounding is not False,
        seed=int(seed),
        backend=backend,
        capturable=bool(capturable),
        offload=offload,
        isolation_granularity=isolation_granularity,
        ratio_schedule=ratio_schedule,
        interval_schedule=interval_schedule,
    )


def shares_importance(group: Mapping[str, Any]) -> bool:
    """Whether ``exp_avg_sq`` serves as the importance of a group's parameters."""
    return group["importance_beta"] is None or group["importance_beta"] == group["betas"][1]


def checked_param_group(given: Any, defaults: Mapping[str, Any], config: IsolationConfig) -> dict[str, Any]:
    """A group as the caller hands it over, validated before it joins the optimizer; a copy, whose parameters are listed.

    ``defaults``: what it leaves to the optimizer.
    """
    if not isinstance(given, dict):
        raise TypeError(f"param_group must be a dict, but got {type(given)}")
    group = dict(given)
    misplaced = [name for name in GLOBAL_OPTIONS if name in group]
    if misplaced:
        raise ValueError(
            f"{', '.join(misplaced)} cannot be set per param group: pass it to the constructor "
            f"(a group may set {', '.join(GROUP_OPTIONS)})"
        )
    check_group_options(group)
    check_importance({**defaults, **group}, config)
    if not isinstance(group["params"], (Tensor, set)):
        group["params"] = list(group["params"])
    return group


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses what no backend steps."""
    refusal = shards.refusal(param)
    if refusal is not None:
        raise NotImplementedError(f"{name} {refusal}")
    if param.dtype == torch.float16:
        raise ValueError(
            f"{name} is float16, whose range is too small for the step: use bfloat16 weights, "
            "or float32 weights under torch.autocast"
        )
    if param.is_complex():
        raise ValueError(f"{name} is complex: optimize torch.view_as_real(param) instead")
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"{name} has dtype {param.dtype}: use float32, bfloat16 or float64")
