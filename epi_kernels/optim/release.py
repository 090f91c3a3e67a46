"""Gradient release: each parameter is stepped as soon as its gradient is complete, and the gradient freed.

``backward()`` then never holds all gradients at once. A step is three parts: ``_begin`` before its first parameter, with
all that may refuse it; ``_release`` a parameter; ``finish`` in ``optimizer.step()``, for what is left and the refresh.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor, nn

from epi_kernels.distributed import shards
from epi_kernels.optim import layers, ranks, schedules, stepping
from epi_kernels.optim.accumulation import Backwards
from epi_kernels.optim.arguments import GROUP_OPTIONS, IsolationConfig, check_group_options
from epi_kernels.optim.captured import is_captured
from epi_kernels.optim.entries import Entry
from epi_kernels.optim.masked_ema_adamw import MaskedEMAAdamW
from epi_kernels.optim.offload import OffloadedPlan
from epi_kernels.optim.plan import StepPlan
from epi_kernels.optim.refresh import StatsByDevice, reduce_stats
from epi_kernels.optim.release_checks import NO_SCALER, check_model, check_processwide, second_gradient
from epi_kernels.optim.uncompiled import uncompiled
from epi_kernels.optim.wrapped import unwrapped
from epi_kernels.policies.checks import is_int, require


def enable_gradient_release(
    model: nn.Module, optimizer: MaskedEMAAdamW, *, accumulation_steps: int = 1
) -> GradientRelease:
    """Frees every gradient during ``backward()``, as soon as its parameter has been stepped with it.

    Training loops and schedulers stay as they are: ``backward()``, ``optimizer.step()``, ``optimizer.zero_grad()``.
    ``step()`` ends the step: it steps whatever still has a gradient (parameters that joined late, or whose gradient was
    put there by hand), counts T and refreshes the masks, with the bits of a step over all gradients at once. Between
    ``backward()`` and ``step()`` nothing is to be changed or saved: ``state_dict()``, ``refresh_isolation_mask()``,
    ``set_isolation_mask()`` and ``carry_importance()`` refuse; the learning rate is the one during ``backward()``.

    Args:
        model: holds every parameter of ``optimizer``; others are left alone. FSDP2 (``fully_shard``) comes before, and
            the call is one of all ranks then.
        accumulation_steps: backwards a step. A parameter is released with its n-th gradient; one that has fewer when
            ``step()`` is called is stepped there.

    What needs all gradients at once does not go together with it. Clipping by the total norm finds no gradients and does
    nothing: clip in ``Tensor.register_hook``, each by itself. Step pre-hooks come too late to change gradients. A second
    optimizer that shares a parameter finds no gradient. A model under ``torch.compile`` works, but hands over the
    gradients of each compiled graph together.

    With ``offload="cpu"`` weights are on their way to and from the host from ``backward()`` until ``step()`` returns: they
    are neither to be read nor to be set before it.

    After a backward that was broken off by an exception, those parameters that had their gradients are stepped.
    ``optimizer.step()`` ends that step, as in torch: parameters without a gradient are skipped; ``load_state_dict`` (and
    the model's, after it) goes back to a checkpoint. A further ``backward()`` before either is refused at the first
    parameter that was stepped: where it takes the same way, before it changes anything.

    Raises:
        TypeError: ``optimizer`` is no MaskedEMAAdamW.
        ValueError: ``model`` lacks a parameter of the optimizer, or ``accumulation_steps`` is no int >= 1.
        RuntimeError: DistributedDataParallel averages these gradients later, modules with sparse gradients,
            ``capturable=True``, gradients that are released already. In ``backward()``: an enabled ``torch.amp.GradScaler`` is in use,
            ``create_graph=True``, a second gradient for one step, or what ``step()`` refuses.
    """
    optimizer = unwrapped(optimizer, "gradient release steps")
    at_least_1 = is_int(accumulation_steps) and accumulation_steps >= 1
    require(at_least_1, "accumulation_steps", accumulation_steps, "an int >= 1")
    if optimizer._release is not None:
        raise RuntimeError("the optimizer releases its gradients already: call remove() on the handle first")
    if optimizer._config.capturable:
        raise RuntimeError(
            "capturable=True: a graph replays the step on all gradients where they lie, and gradient release frees them: "
            "make the optimizer with capturable=False"
        )
    entries = list(optimizer._parameters())
    stepping.join_ranks(optimizer, [entry.param for entry in entries])
    check_model(model, entries)
    check_processwide(entries)
    ranks.agree_once(optimizer._world, entries, optimizer._config)
    handle = GradientRelease(optimizer, accumulation_steps)
    optimizer._release = handle
    return handle


class GradientRelease:
    """Handle of ``enable_gradient_release``; ``remove()`` ends it."""

    def __init__(self, optimizer: MaskedEMAAdamW, accumulation_steps: int) -> None:
        # it holds the handle, and its state is to go when it goes
        self._optimizer_ref = weakref.ref(optimizer)
        self._backwards = Backwards(accumulation_steps)
        self._lock = threading.Lock()  # autograd runs a thread a device
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self._plans: dict[Tensor, StepPlan | OffloadedPlan] = {}
        self._entries: dict[Tensor, Entry] = {}
        self._groups: list[dict] = []  # those of the entries
        self._looked_around = False
        self.forget()
        self._hook_parameters()
        weakref.finalize(self, _remove_all, self._handles)

    def remove(self) -> None:
        """Gradients stay until ``zero_grad()`` again.

        Raises:
            RuntimeError: a step has begun; ``optimizer.step()`` ends it.
        """
        self.refuse_while_open("remove()")
        _remove_all(self._handles)
        optimizer = self._optimizer_ref()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None

    @property
    def _optimizer(self) -> MaskedEMAAdamW:
        optimizer = self._optimizer_ref()
        assert optimizer is not None, "hooks end with the optimizer"
        return optimizer

    # ---------------------------------------------------------------- called by the optimizer

    @property
    def is_open(self) -> bool:
        """Whether parameters have been stepped since the last ``optimizer.step()``."""
        return len(self._stepped) > 0

    def refuse_while_open(self, what: str) -> None:
        if self.is_open:
            raise RuntimeError(
                f"{what} in the middle of a step: {len(self._stepped)} parameters have been stepped during backward() "
                "(enable_gradient_release); call optimizer.step() first"
            )

    def refuse_scaler(self) -> None:
        if any(getattr(self._optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            done = f"; {len(self._stepped)} were already stepped with scaled ones" if self.is_open else ""
            raise RuntimeError(f"{NO_SCALER}{done}")

    def forget(self) -> None:
        """Drops the plans and the state they hold, and the step that may have begun."""
        self._plans.clear()
        self._groups = []
        self._start_anew()

    def forget_accumulated(self) -> None:
        self._backwards.forget()

    def end_step(self) -> None:
        self._start_anew()
        self._hook_parameters()

    def finish(self) -> None:
        """Ends the step that has begun: what still has a gradient, T, the refresh.

        Raises as ``step()`` does; nothing has changed since the backward then, and it may be called again.
        """
        optimizer = self._optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads, alike = shards.gradients(params, any_sharded=optimizer._world is not None)
        left = {param for param, grad in zip(params, grads, strict=True) if grad is not None}
        again = left & self._stepped
        if again:
            raise RuntimeError(second_gradient(self._entries[again.pop()].name))

        def refusal() -> Exception | None:
            return stepping.refusal_of(optimizer, params, grads, written=False, alike=alike) if left else None

        opened = None if self._now is None else stepping.open_refresh(optimizer, lambda: self._now, refusal)
        now, table = opened or (None, None)
        if left:
            plan = stepping.plan_of(optimizer, params, grads, written=False, alike=alike)
            plan.run(grads, grad_scale=None, found_inf=None, layers=None, stats=None)
        stepping.drain(optimizer)
        if len(optimizer.state) > self._n_states:  # in the order of one step over all of them
            new = set(list(optimizer.state)[self._n_states :])
            for param in params:
                if param in new:
                    optimizer.state[param] = optimizer.state.pop(param)
        optimizer._set_isolation_step(optimizer._isolation_step + 1)
        if now is not None and table is not None:
            covered = self._stepped | left
            stats = StatsByDevice(len(table.names), now)
            entries = [entry for entry in optimizer._parameters() if entry.param in covered]
            reduce_stats(entries, optimizer.state, table, stats, now)
            stepping.refresh_masks(optimizer, table, stats, now, covered=covered, due=True)

    # ---------------------------------------------------------------- hooks

    def _hook_parameters(self) -> None:
        """All that the optimizer has now, frozen ones too: they may be unfrozen."""
        this = weakref.ref(self)

        def on_gradient(param: Tensor) -> None:
            release = this()
            if release is not None:
                release._on_gradient(param)

        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        for param in params:
            if param not in self._handles:
                self._handles[param] = _register(param, on_gradient)
        if len(self._handles) > len(params):
            for param in self._handles.keys() - set(params):
                self._handles.pop(param).remove()

    @uncompiled
    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        grad = param.grad
        if grad is None:
            return
        with self._lock:
            if param in self._stepped:
                raise RuntimeError(second_gradient(self._entries[param].name))
            if self._backwards.completes(param, grad):
                if not self.is_open:
                    self._begin()
                if param in self._entries:  # else it has left the optimizer's groups
                    self._release(self._entries[param], grad)

    def _begin(self) -> None:
        """Looks at what a step may refuse before anything changes."""
        optimizer = self._optimizer
        is_captured(capturable=False)
        groups = optimizer.param_groups
        known = [param for group in groups for param in group["params"]]
        stepping.join_ranks(optimizer, known)
        same_groups = len(groups) == len(self._groups) and all(map(is_, groups, self._groups))
        if not same_groups or len(known) != len(self._entries) or not all(map(is_, known, self._entries)):
            optimizer._given.check(groups)
            self._entries = {entry.param: entry for entry in optimizer._parameters()}
            self._groups = list(groups)
        if not self._looked_around:
            check_processwide(self._entries.values(), scalers=True)
            self._looked_around = True
        for group in groups:
            check_group_options({key: group[key] for key in GROUP_OPTIONS})
        entries, now = list(self._entries.values()), None
        if optimizer._refresh_may_follow():
            optimizer._settle()
            now = schedules.due_settings(optimizer._config, groups[0])
        if now is not None:
            layers.check_before_refresh(entries, optimizer.state, optimizer._config)
        stepping.agree(optimizer)
        self._now, self._n_states = now, len(optimizer.state)

    def _release(self, entry: Entry, grad: Tensor) -> None:
        if grad.requires_grad:
            raise RuntimeError(
                "backward(create_graph=True) needs gradients and weights as they are, and gradient release frees and "
                "changes them: call remove() on its handle"
            )
        param = entry.param
        grads, alike = shards.gradients([param], any_sharded=self._optimizer._world is not None)
        plan = self._plan(entry, grads, alike)
        plan.run(grads, grad_scale=None, found_inf=None, layers=None, stats=None)
        self._stepped.add(param)
        param.grad = None

    def _plan(self, entry: Entry, grads: list[Tensor | None], alike: bool) -> StepPlan | OffloadedPlan:
        """The parameter's plan of the last step while it fits."""
        param, states = entry.param, self._optimizer.state
        held = {param: states[param] if param in states else {}}
        plan = self._plans.get(param)
        if plan is None or not plan.fits([param], grads, held, alike=alike):
            self._plans.pop(param, None)
            plan = stepping.make_plan(self._optimizer, [entry], grads, held, written=False)
            self._plans[param] = plan
            states.setdefault(param, held[param])
        return plan

    def _start_anew(self) -> None:
        self._stepped: set[Tensor] = set()
        self._backwards.forget()
        self._n_states = 0  # parameters that had state before the step
        self._now: IsolationConfig | None = None  # settings of the refresh after this step


def _register(param: Tensor, hook: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """On a frozen parameter too, which torch refuses."""
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    try:
        return param.register_post_accumulate_grad_hook(hook)
    finally:
        if frozen:
            param.requires_grad_(False)


def _remove_all(handles: dict[Tensor, torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
