"""An optimizer's state goes out, comes in, and is carried into a new stage: on all ranks or on none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from epi_kernels.distributed.shards import any_sharded, is_sharded
from epi_kernels.optim import carry, ranks, schedules, stepping
from epi_kernels.optim.compact import expand_states
from epi_kernels.optim.entries import list_entries
from epi_kernels.optim.group_masks import put_in_groups
from epi_kernels.optim.masks import MASK_KEYS, zero_mask
from epi_kernels.optim.sharded_state import export_states
from epi_kernels.optim.skipped import SkippedSteps
from epi_kernels.optim.state import always_has_mask, complete_state, read_state_dict

if TYPE_CHECKING:
    from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW


def ready(optimizer: MaskedEMAAdamW, what: str) -> None:
    """Makes the state what the last step left, T exact; refused in the middle of one."""
    optimizer._refuse_in_a_step(what)
    optimizer._adopt_state()
    optimizer._settle()


def saved(optimizer: MaskedEMAAdamW, of_torch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``state_dict()`` gives; ``of_torch``: torch's own."""
    ready(optimizer, "state_dict()")
    hooks = optimizer._optimizer_state_dict_post_hooks
    optimizer._optimizer_state_dict_post_hooks = OrderedDict()
    try:
        found = of_torch()
    finally:
        optimizer._optimizer_state_dict_post_hooks = hooks
    # as torch numbers them
    params = list(dict.fromkeys(param for group in optimizer.param_groups for param in group["params"]))
    whole = expand_states(found["state"], params)
    if any_sharded(params):
        export_states(found["state"], params)
    put_in_groups(
        found["param_groups"],
        optimizer.param_groups,
        {**optimizer.state, **whole} if whole else optimizer.state,
        config=optimizer._config,
        template_has_masks=always_has_mask(optimizer._config),
    )
    for hook in hooks.values():  # they see what is saved
        replaced = hook(optimizer, found)
        found = found if replaced is None else replaced
    return found


def complete_template(optimizer: MaskedEMAAdamW) -> None:
    """Before the first step, of an optimizer that was given masks or importance: the states that a step would make.

    torch makes a template by such a step, but only where there is no state at all: of the other parameters a load in place
    would drop all there is.
    """
    ready(optimizer, "state_dict()")
    if optimizer._isolation_step == 0 and any(optimizer.state.values()):
        for group, param, *_ in optimizer._parameters():
            if param.requires_grad:
                complete_state(optimizer.state[param], param, group, optimizer._config)


def load(optimizer: MaskedEMAAdamW, state_dict: dict[str, Any], *, spent: bool = False) -> None:
    """``load_state_dict()``: read whole before anything changes. torch's own policy would cast importances to the
    parameter's dtype and packed masks to floats. ``spent``: the dict is emptied meanwhile."""
    state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else {}
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    stepping.join_ranks(optimizer, [entry.param for entry in optimizer._parameters()])
    state, groups = ranks.all_or_none(
        lambda: read_state_dict(state_dict, optimizer.param_groups, optimizer._config, spent=spent),
        optimizer._world,
        optimizer._device(),
    )
    stepping.drain(optimizer)  # of a backward that was broken off
    _keep_on_all_ranks(optimizer, state, groups)
    optimizer._forget_plans()
    optimizer.__setstate__({"state": state, "param_groups": groups})
    optimizer._report, optimizer._skipped = None, SkippedSteps()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _keep_on_all_ranks(
    optimizer: MaskedEMAAdamW, states: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """A mask of a sharded parameter that was loaded on some ranks, for there are bits there, is in its state on all of
    them: each one's dict says the same of it."""
    if optimizer._world is None:
        return
    entries = [entry for entry in list_entries(groups) if is_sharded(entry.param)]
    each = [(entry, key) for entry in entries for key in MASK_KEYS]
    used = optimizer._world.union(
        {(entry.name, key) for entry, key in each if key in states.get(entry.param, {})}
    )
    for entry, key in each:
        if (entry.name, key) in used and key not in states.get(entry.param, {}):
            state = states[entry.param]
            complete_state(state, entry.param, entry.group, optimizer._config)
            state.setdefault(key, zero_mask(entry.param))


def carry_from(optimizer: MaskedEMAAdamW, source: Optimizer | dict[str, Any]) -> None:
    """``carry_importance()``: read whole before anything changes."""
    entries = list(optimizer._parameters())
    named = all("param_names" in group for group in optimizer.param_groups)
    names = [entry.name for entry in entries] if named else None
    stepping.join_ranks(optimizer, [entry.param for entry in entries])

    def read() -> list[dict[str, Any]]:
        carried = carry.match_source(source, [entry.param for entry in entries], names)
        return carry.fresh_states(entries, carried, optimizer.state, optimizer._config)

    fresh = ranks.all_or_none(read, optimizer._world, optimizer._device())
    optimizer._forget_plans()
    carry.put_states(entries, fresh, optimizer.state)
    optimizer._skipped.read()
    optimizer._set_isolation_step(0)
    schedules.start_schedules(optimizer.param_groups, optimizer._config)
