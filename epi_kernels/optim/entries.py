"""A parameter as the optimizer lists it, with its gradient and state: checked, and handed to the stages."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from epi_kernels.backends import choose
from epi_kernels.distributed import shards
from epi_kernels.optim.arguments import INT8, IsolationConfig, check_parameter, shares_importance
from epi_kernels.optim.compact import runs_of, state_shape
from epi_kernels.optim.corrections import CORRECTION_KEY
from epi_kernels.optim.home import home, offload_refusal
from epi_kernels.optim.masks import MASK_KEYS
from epi_kernels.optim.moments import MOMENT_KEYS, SCALE_OF, has_nibbles
from epi_kernels.reference.bits import packed_bytes
from epi_kernels.reference.codec import scale_bytes
from epi_kernels.reference.master import CORRECTION_DTYPES
from epi_kernels.reference.tensors import ParamTensors


class Entry(NamedTuple):
    """One parameter as the optimizer lists it."""

    group: dict[str, Any]
    param: Tensor
    name: str
    rng_id: int  # CRC-32 of the name, or the position when unnamed

    @property
    def weight(self) -> Tensor:
        """What of the parameter lies on this rank."""
        return shards.local(self.param)


def list_entries(param_groups: Iterable[dict[str, Any]]) -> Iterator[Entry]:
    """Every parameter in order; unnamed ones go by position."""
    position = 0
    for group in param_groups:
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            name = f"param_{position}" if names is None else names[i]
            yield Entry(group, param, name, position if names is None else zlib.crc32(name.encode()))
            position += 1


def entry_of(param: Tensor, param_groups: Iterable[dict[str, Any]]) -> Entry:
    """
    Raises:
        ValueError: the parameter is in no group.
    """
    for entry in list_entries(param_groups):
        if entry.param is param:
            return entry
    raise ValueError("this parameter is not in any of the optimizer's groups")


def check_parameters(params: Any, names: dict[str, Tensor], config: IsolationConfig) -> None:
    """What a group brings, before it joins: tensors or (name, tensor) pairs. ``names``: those taken.

    Raises:
        ValueError: a dtype that no backend steps, a name that is taken, or missing where names are needed.
        NotImplementedError: a parameter is sharded in an unsupported way, its states cannot be offloaded, or its backend
            cannot be captured.
    """
    for position, entry in enumerate([params] if isinstance(params, Tensor) else params):
        named = isinstance(entry, tuple) and len(entry) == 2
        name, param = entry if named else (f"param_{position}", entry)
        if isinstance(param, Tensor):  # torch itself refuses what is not
            check_parameter(param, str(name))
            _check_offload(param, str(name), config)
            backend = choose(config.backend, home(param, config), param.dtype).backend
            if config.capturable and not backend.captures:
                raise NotImplementedError(
                    f"capturable=True: the {backend.name} backend, which steps {name}, cannot be captured in a CUDA graph; "
                    "the triton backend can, on a CUDA device"
                )
            if named and names.setdefault(str(name), param) is not param:
                raise ValueError(
                    f"two parameters are named {name!r}: names choose layers, random numbers and what importance "
                    "is carried; prefix the names of one model"
                )
        if config.layer_key is not None and not named:
            raise ValueError(
                "layer_key needs names: pass (name, tensor) pairs, e.g. model.named_parameters()"
            )


def _check_offload(param: Tensor, name: str, config: IsolationConfig) -> None:
    refusal = None if config.offload is None else offload_refusal(param)
    if refusal is not None:
        raise NotImplementedError(f"{name} {refusal}")


class Given:
    """The parameters an optimizer was made with: by id, for torch swaps no tensor that has a weak reference, and by shape."""

    def __init__(self, groups: Iterable[Mapping[str, Any]] = ()) -> None:
        self.ids: list[int] = []
        self._shapes: list[torch.Size | None] = []
        for group in groups:
            self.add(group["params"])

    def add(self, params: Sequence[Tensor]) -> None:
        self.ids += map(id, params)
        self._shapes += map(_shape, params)

    def replace(self, params: Sequence[Tensor]) -> None:
        """These are in the places now, in the groups' order."""
        self.ids, self._shapes = [], []
        self.add(params)

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses groups whose parameters somebody has exchanged for other ones, of another number or shape: names, layers
        and masks would no longer be theirs."""
        params = [param for group in groups for param in group["params"]]
        named = all(
            len(group.get("param_names", group["params"])) == len(group["params"]) for group in groups
        )
        if len(params) != len(self.ids) or not named:
            raise RuntimeError(
                f"the optimizer was made with {len(self.ids)} parameters and its groups now hold {len(params)}: {_FLATTENED}"
            )
        if set(map(id, params)) == set(self.ids):  # in another order at most
            return
        for param, number, shape in zip(params, self.ids, self._shapes, strict=True):
            if id(param) != number and shape is not None and param.shape != shape:
                raise RuntimeError(
                    f"the optimizer was made with a parameter of shape {list(shape)} in whose place its groups now hold one of "
                    f"{list(param.shape)}: {_FLATTENED}"
                )


_FLATTENED = (
    "DeepSpeed's ZeRO replaces them by flat buffers, which tears layers apart. Use FSDP2, "
    "torch.distributed.fsdp.fully_shard, or DeepSpeed without ZeRO (stage 0)"
)


def _shape(param: Tensor) -> torch.Size | None:
    """None of a lazy module's parameter that has none yet."""
    return None if is_lazy(param) else param.shape


def check_gradient(entry: Entry, grad: Tensor, config: IsolationConfig) -> None:
    """Refuses what no backend steps, before anything changes. ``grad``: what of it lies on this rank."""
    param, name = entry.weight, entry.name
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse, which MaskedEMAAdamW does not support: "
            "use sparse=False in the embedding, or torch.optim.SparseAdam for it"
        )
    if grad.dtype != param.dtype or grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {name} is {grad.dtype} {list(grad.shape)} on {grad.device}, "
            f"its parameter {param.dtype} {list(param.shape)} on {param.device}"
        )
    if _is_expanded(param):
        raise RuntimeError(
            f"{name} is expanded (several elements share one place in memory), so they cannot take steps of their own: "
            "use .contiguous() on it"
        )
    _check_offload(entry.param, name, config)
    choose(config.backend, home(entry.param, config), param.dtype)


def _is_expanded(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and any(
        stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape)
    )


def check_written_gradient(entry: Entry, grad: Tensor) -> None:
    """Refuses a gradient that a loss scale cannot be divided out of."""
    if _is_expanded(grad):
        raise RuntimeError(
            f"the gradient of {entry.name} is expanded (several elements share one place in memory), so a loss scale cannot "
            "be divided out of it in place: use .contiguous() on it"
        )


_MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.float64, INT8)


def check_state(entry: Entry, state: Mapping[str, Any], config: IsolationConfig) -> None:
    """Refuses state that does not fit its parameter: kernels trust sizes and addresses.

    It happens when a parameter is resized or moved after the first step.
    """
    param, state, device = entry.weight, local_state(state), home(entry.param, config)
    shape = state_shape(state, param)
    n_stored = shape.numel()
    for key in (*MOMENT_KEYS, *SCALE_OF.values(), CORRECTION_KEY, *MASK_KEYS):
        if key in state and not isinstance(state[key], Tensor):
            _refuse_state(entry, key, state[key])
    for key in () if _has_nibbles(state, param, device) else MOMENT_KEYS:
        value = state.get(key)
        if value is not None and not (value.dtype in _MOMENT_DTYPES and _lies_beside(value, shape, device)):
            _refuse_state(entry, key, value)
        n_scales = scale_bytes(n_stored) if value is not None and value.dtype == INT8 else None
        _check_bytes(entry, state, SCALE_OF[key], n_scales, device)
    if state and state["exp_avg"].dtype != state["exp_avg_sq"].dtype:
        _refuse_state(entry, "exp_avg", state["exp_avg"])
    correction = state.get(CORRECTION_KEY)
    if correction is not None and not (
        param.dtype == torch.bfloat16
        and correction.dtype in CORRECTION_DTYPES.values()
        and _lies_beside(correction, param.shape, device)
    ):
        _refuse_state(entry, CORRECTION_KEY, correction)
    for key in MASK_KEYS:
        _check_bytes(entry, state, key, packed_bytes(n_stored) if key in state else None, device)


def _has_nibbles(state: Mapping[str, Any], param: Tensor, device: torch.device) -> bool:
    """Whether the moments are packed 4-bit codes as kernels take them; what is not is looked at one by one."""
    parts = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    return has_nibbles(state, "exp_avg", param.numel()) and all(
        state[part].device == device and state[part].is_contiguous() for part in parts
    )


def local_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state's tensors on this rank."""
    return {key: shards.local(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _lies_beside(value: Tensor, shape: torch.Size, device: torch.device) -> bool:
    return value.shape == shape and value.device == device and value.is_contiguous()


def _check_bytes(
    entry: Entry, state: Mapping[str, Any], key: str, expected: int | None, device: torch.device
) -> None:
    """``state[key]`` is uint8 [expected] on ``device``; absent where that is None."""
    value = state.get(key)
    if value is None and expected is None:
        return
    if value is None or not (
        value.shape == (expected,) and value.device == device and value.dtype == torch.uint8
    ):
        _refuse_state(entry, key, value)


def _refuse_state(entry: Entry, key: str, value: Any) -> None:
    param = entry.weight
    found = "missing" if value is None else f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        found = f"{value.dtype} {list(value.shape)} on {value.device}"
    raise RuntimeError(
        f"the state {key!r} of {entry.name} is {found} and does not fit "
        f"its parameter, {param.dtype} {list(param.shape)} on {param.device}. If the parameter was resized or moved "
        "after a step, make a new optimizer (carry_importance starts it from this one where shapes agree)"
    )


def param_tensors(
    param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], layer: int
) -> ParamTensors:
    """Of what lies on this rank."""
    state = local_state(state)
    return ParamTensors(
        param=shards.local(param),
        grad=None,
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        importance=None if shares_importance(group) else state["importance"],
        isolation_mask=state.get("isolation_mask"),
        persistent_mask=state.get("persistent_mask"),
        layer=layer,
        exp_avg_scale=state.get("exp_avg_scale"),
        exp_avg_sq_scale=state.get("exp_avg_sq_scale"),
        importance_scale=state.get("importance_scale"),
        weight_correction=state.get(CORRECTION_KEY),
        runs=runs_of(state),
    )
