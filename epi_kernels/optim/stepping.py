"""The order of the stages: the step over all gradients and, where a refresh is due, stats, threshold and mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from epi_kernels.distributed import shards
from epi_kernels.distributed.world import World
from epi_kernels.optim import ranks, schedules
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.captured import ReplayedSteps, check_capture
from epi_kernels.optim.compact import expanded
from epi_kernels.optim.entries import Entry
from epi_kernels.optim.home import bring_home
from epi_kernels.optim.layers import check_before_refresh, find_layers
from epi_kernels.optim.offload import HostPipeline, OffloadedPlan
from epi_kernels.optim.plan import StepPlan, check_step
from epi_kernels.optim.refresh import StatsByDevice, partition, refresh
from epi_kernels.optim.report import IsolationReport, warn_after_refresh
from epi_kernels.optim.state import load_param_state
from epi_kernels.optim.template import is_template
from epi_kernels.policies.layers import LayerTable

if TYPE_CHECKING:
    from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW


def step_at_once(optimizer: MaskedEMAAdamW) -> None:
    """``step()`` over all gradients. What may be refused is looked at before anything changes."""
    config, first_group = optimizer._config, optimizer.param_groups[0]
    # both set by torch.amp.GradScaler
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    join_ranks(optimizer, params)
    written, unread = grad_scale is not None, None
    grads: list[Tensor | None] = [None] * len(params)
    alike = False
    try:
        grads, alike = shards.gradients(params, any_sharded=optimizer._world is not None)
    except RuntimeError as error:  # the others hear of it where they meet
        unread = error

    def refusal() -> Exception | None:
        return unread or refusal_of(optimizer, params, grads, written=written, alike=alike)

    if takes_no_step(optimizer, grads, refusal):
        plan_of(optimizer, params, grads, written=False)
        return
    if optimizer._captured.graphs:  # which may have been replayed since
        optimizer._settle()
    may_refresh, opened = optimizer._refresh_may_follow(), None
    if may_refresh:
        optimizer._settle()
        found_inf = None if found_inf is None else found_inf.cpu()  # the host waits once
        if not found_inf:
            opened = open_refresh(optimizer, lambda: schedules.due_settings(config, first_group), refusal)
    if unread is not None:
        raise unread
    now, table = opened or (None, None)
    plan = plan_of(optimizer, params, grads, written=written, alike=alike)
    if found_inf is not None and (may_refresh or not plan.counts_on_device):
        optimizer._settle()
        if bool(found_inf):
            return
        found_inf = None

    stats = None if table is None else StatsByDevice(len(table.names), config)
    try:
        plan.run(grads, grad_scale=grad_scale, found_inf=found_inf, layers=table, stats=stats)
    finally:
        drain(optimizer)
    optimizer._set_isolation_step(optimizer._isolation_step + 1)
    if found_inf is not None:  # the device knows whether it was a step
        optimizer._skipped.note(found_inf)
    if now is not None and table is not None and stats is not None:
        refresh_masks(optimizer, table, stats, now, covered=plan.covered(), due=True)


def captured_step(optimizer: MaskedEMAAdamW) -> None:
    """A step that a graph will replay: nothing is waited for, no refresh, T by the device's count."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads, alike = shards.gradients(params, any_sharded=optimizer._world is not None)
    plan = optimizer._plan
    assert not isinstance(plan, OffloadedPlan), "offload and capturable are refused together"
    check_capture(plan, plan is not None and plan.fits(params, grads, optimizer.state, alike=alike))
    assert plan is not None
    plan.run(grads, grad_scale=grad_scale, found_inf=found_inf, layers=None, stats=None)
    optimizer._captured.keep(plan, grads)


Refusal = Callable[[], Exception | None]  # why this rank cannot take the step at hand


def refusal_of(
    optimizer: MaskedEMAAdamW,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    written: bool,
    alike: bool,
) -> Exception | None:
    """What a step with these gradients would refuse, for the ranks to hear where they meet; a rank by itself is refused by
    the plan."""
    plan, refused = optimizer._plan, None
    if optimizer._world is None:
        return None
    try:
        if plan is None or not plan.fits(params, grads, optimizer.state, alike=alike):
            optimizer._given.check(optimizer.param_groups)
            entries = list(optimizer._parameters())
            check_step(entries, grads, optimizer.state, optimizer._config, written=written)
    except Exception as error:
        refused = error
    return refused


def takes_no_step(optimizer: MaskedEMAAdamW, grads: Sequence[Tensor | None], refusal: Refusal) -> bool:
    """Whether the step makes a template, on all ranks. Where they have not agreed yet they do so here, first of all."""
    world, here = optimizer._world, is_template(optimizer, grads)
    return here if world is None else agree(optimizer, votes=here, refusal=refusal)


def agree(optimizer: MaskedEMAAdamW, *, votes: bool = False, refusal: Refusal = lambda: None) -> bool:
    """Before a step, a call of all ranks where they have to compare: until T is 1, and after a load. Whether all vote yes.

    Raises:
        Exception: what ``refusal`` gives; a ValueError with its words on the other ranks.
    """
    world = optimizer._world
    if world is not None and optimizer._isolation_step == 0:
        world.forget()
    if world is None or world.agreed:
        return False
    entries = list(optimizer._parameters())
    return bool(ranks.agree_once(world, entries, optimizer._config, votes=votes, refused=refusal()))


def join_ranks(optimizer: MaskedEMAAdamW, params: Sequence[Tensor]) -> None:
    """Accelerate puts DTensors in the place of parameters that an optimizer was made with."""
    if optimizer._world is None and shards.any_sharded(params):
        optimizer._world = World()
    adopt_state(optimizer, params)


def adopt_state(optimizer: MaskedEMAAdamW, params: Sequence[Tensor]) -> None:
    """Hands the state of parameters that others have taken the place of to their successors, by position. State of
    parameters that have only changed places stays theirs; what is offloaded is brought home.

    Raises:
        RuntimeError: they are of another number or shape.
        ValueError: the state does not fit a successor.
    """
    if optimizer._plan is not None and optimizer._plan.is_over(params):
        return
    bring_home(params, optimizer.state, optimizer._config)
    given, found = optimizer._given, list(map(id, params))
    if found == given.ids:
        return
    given.check(optimizer.param_groups)
    here = set(found)
    gone = {
        id(param): param for param in optimizer.state if id(param) not in here
    }  # these outlive their places
    moved = {}
    for entry, number in zip(optimizer._parameters(), given.ids, strict=True):
        old = gone.get(number)
        if old is not None and optimizer.state.get(old) and not optimizer.state.get(entry.param):
            state = expanded(optimizer.state[old], entry.param)
            moved[old] = (
                entry,
                load_param_state(state, entry.param, entry.group, optimizer._config, entry.name),
            )
    for old, (entry, state) in moved.items():
        del optimizer.state[old]
        optimizer.state[entry.param] = state
    given.replace(params)
    optimizer._plan = None


def plan_of(
    optimizer: MaskedEMAAdamW,
    params: list[Tensor],
    grads: list[Tensor | None],
    *,
    written: bool,
    alike: bool = False,
) -> StepPlan | OffloadedPlan:
    """The last plan while it fits: building one costs milliseconds where there are hundreds of tensors."""
    plan = optimizer._plan
    if plan is None or not plan.fits(params, grads, optimizer.state, alike=alike):
        optimizer._plan = None
        optimizer._given.check(optimizer.param_groups)
        entries = list(optimizer._parameters())
        if optimizer._config.capturable:
            optimizer._settle()
        plan = make_plan(optimizer, entries, grads, optimizer.state, written=written)
        step = plan.a_step() if isinstance(plan, StepPlan) and optimizer._config.capturable else None
        optimizer._plan = plan
        optimizer._replayed = None if step is None else ReplayedSteps(step, optimizer._isolation_step)
    return plan


def make_plan(
    optimizer: MaskedEMAAdamW,
    entries: Sequence[Entry],
    grads: Sequence[Tensor | None],
    state_of: Mapping[Tensor, dict[str, Any]],
    *,
    written: bool,
) -> StepPlan | OffloadedPlan:
    """Raises as ``StepPlan`` does."""
    config = optimizer._config
    if config.offload is None:
        return StepPlan(entries, grads, state_of, config, written=written)
    if optimizer._pipeline is None:
        trained = (entry.weight for entry in optimizer._parameters() if entry.param.requires_grad)
        optimizer._pipeline = HostPipeline(trained)
    return OffloadedPlan(entries, grads, state_of, config, optimizer._pipeline, written=written)


def drain(optimizer: MaskedEMAAdamW) -> None:
    """Waits for the steps that are on their way through the host."""
    if optimizer._pipeline is not None:
        optimizer._pipeline.drain()


def open_refresh(
    optimizer: MaskedEMAAdamW, ask: Callable[[], IsolationConfig | None], refusal: Refusal = lambda: None
) -> tuple[IsolationConfig, LayerTable] | None:
    """The numbers of a refresh, which ``ask`` gives, and its layers; None where it gives none, on all ranks. What a
    refresh may refuse is refused here, and the step before it (``refusal``), and heard by all ranks."""
    entries = list(optimizer._parameters())
    join_ranks(optimizer, [entry.param for entry in entries])
    now, refused = None, None
    try:
        now = ask()
        if now is None:
            return None
        check_before_refresh(entries, optimizer.state, optimizer._config)
        refused = refusal()
    except Exception as error:  # a user's function raises what it likes
        refused = error
    now = optimizer._config if now is None else now
    step, device = optimizer._isolation_step, optimizer._device()
    return now, find_layers(entries, now, optimizer._world, step, device, refused)


def refresh_now(optimizer: MaskedEMAAdamW) -> IsolationReport:
    """A refresh by hand, whatever T."""
    optimizer._settle()
    config, group = optimizer._config, optimizer.param_groups[0]
    opened = open_refresh(optimizer, lambda: schedules.settings_at(config, group, optimizer._isolation_step))
    assert opened is not None, "asked for by hand"
    now, table = opened
    stats = StatsByDevice(len(table.names), now)
    return refresh_masks(optimizer, table, stats, now, covered=set(), due=False)


def refresh_masks(
    optimizer: MaskedEMAAdamW,
    table: LayerTable,
    stats: StatsByDevice,
    now: IsolationConfig,
    *,
    covered: set[Tensor],
    due: bool,
) -> IsolationReport:
    """Stages 2 to 4, with the numbers in ``now``; ``covered``: parameters whose stats the step has reduced."""
    entries = [entry for entry in optimizer._parameters() if entry.param.numel() > 0]
    partitions, stateless = partition(entries, optimizer.state, table, covered, now)
    step, device = optimizer._isolation_step, optimizer._device()
    report = refresh(partitions, table, stateless, stats, now, step, optimizer._world, device)
    optimizer._report = report
    schedules.after_refresh(now, optimizer.param_groups, report, due=due)
    optimizer._warned_nothing_selected = warn_after_refresh(
        report, table, warned_before=optimizer._warned_nothing_selected
    )
    return report
