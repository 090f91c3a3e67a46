"""MaskedEMAAdamW: torch.optim.AdamW with evolving parameter isolation inside the fused step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from epi_kernels.distributed.world import World
from epi_kernels.optim import arguments, ranks, saving, schedules, stepping
from epi_kernels.optim import state as state_
from epi_kernels.optim.captured import Captured, ReplayedSteps, is_captured, steps_done
from epi_kernels.optim.compact import change_whole, check_granularity, whole_masks
from epi_kernels.optim.corrections import master_weight
from epi_kernels.optim.entries import Entry, Given, check_parameters, check_state, entry_of, list_entries
from epi_kernels.optim.group_text import STATE_VERSION, VERSION_KEY
from epi_kernels.optim.home import HOST
from epi_kernels.optim.masks import check_mask, install_mask, unpacked_mask
from epi_kernels.optim.offload import HostPipeline, OffloadedPlan
from epi_kernels.optim.plan import StepPlan
from epi_kernels.optim.report import IsolationReport, warn_unused_importance_dtype
from epi_kernels.optim.skipped import SkippedSteps
from epi_kernels.optim.uncompiled import uncompiled
from epi_kernels.policies.schedule import IntervalSchedule, RatioSchedule

if TYPE_CHECKING:
    from epi_kernels.optim.release import GradientRelease

_STEP = state_.STEP_KEY
_COPIED = """
    _config _world _report _skipped _given_lr_0 _warned_nothing_selected _step_supports_amp_scaling
""".split()


class MaskedEMAAdamW(Optimizer):
    r"""AdamW that isolates the most important parameters, in one fused step.

    .. math::
        \begin{aligned}
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= v_t \quad\text{(shared), or}\quad \beta_u u_{t-1} + (1 - \beta_u) g_t^2 \\
        \theta_t &= \begin{cases}
            \theta_{t-1} & \text{if isolated} \\
            (1 - \gamma\lambda)\,\theta_{t-1}
              - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
                \cdot \frac{m_t}{\sqrt{v_t} + \epsilon\sqrt{1 - \beta_2^t}} & \text{otherwise}
        \end{cases}
        \end{aligned}

    Every ``mask_interval`` steps the importances ``u`` are normalised within each layer and the
    ``floor(isolation_ratio * N)`` highest scores of the ``N`` eligible elements become isolated: their
    weights keep their bits, weight decay included, until a later refresh releases them. ``m``, ``v`` and
    ``u`` advance for isolated elements too. Importance is what the optimizer sees: the accumulated,
    clipped gradient, once a step; an EMA of the squared batch gradient is not a per-sample Fisher.

    Args:
        params: tensors, (name, tensor) pairs, or groups. A group may set lr, betas, eps, weight_decay,
            maximize, isolate (take part in isolation, default True) and importance_beta.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        foreach, fused: accepted and without effect, because every backend is both; refused together.
        amsgrad, differentiable: refused when True.
        capturable: ``step()`` may be captured in a CUDA graph (Triton backend). Take a step first, capture, replay; a
            refresh stays outside: call ``refresh_isolation_mask()`` between replays. T is exact there and in
            ``state_dict()``. An lr that changes must be a float32 tensor on the parameters' device.
        isolation_ratio: p in [0, 1); 0 is plain AdamW. Or a function of T (an int: the steps done), asked when the
            optimizer is made (T = 0) and at every refresh; or an ``AdaptiveRatio``, which follows the masks' drift.
        mask_interval: H, steps between refreshes; None never refreshes by itself (static masks). Or a function of
            T, asked at T = 0 and at every refresh due, for the steps to the next; or an ``AdaptiveInterval``.
        mask_warmup: step of the first refresh; None means ``mask_interval`` (of T = 0).
        importance_beta: decay of an own importance; None (or beta2) shares ``exp_avg_sq`` at no cost.
        importance_dtype: of an own importance: torch.float32, torch.bfloat16 or "int8". A shared one has ``state_dtype``.
        normalization: within a layer: "minmax", "zscore" or "none".
        scope: "global" ranks all layers together, "layer" each by itself.
        layer_key: name -> hashable; parameters of one value form a layer. Needs named parameters.
        hysteresis: h in [0, 1): scores of isolated elements are divided by 1 - h before selection.
        state_dtype: of exp_avg and exp_avg_sq; None is the parameter's. torch.float32, torch.bfloat16, "int8" or "int4":
            codes under a scale a block of 64; tensors below 4,096 elements keep float32. "int4" shares exp_avg_sq.
        master_weight_bits: of bfloat16 weights: 16; 24 or 32 keep an 8- or 16-bit correction beside each, with which
            the step computes as with float32 weights (24: rounded to 16 bits of mantissa). Other weights have none.
        stochastic_rounding: of bfloat16 weights and of states of 16 bits and less; None means on.
        seed: of the stochastic rounding.
        backend: "auto", "triton", "cuda", "cpu" or "reference".
        offload: None, or "cpu": states, and the corrections of ``master_weight_bits`` (32: with the weights an exact float32
            copy of them), lie in pinned host memory and are stepped there, parameter by parameter, with the bits of a step
            on the device. Gradients and weights are copied there and weights back, on streams of their own; under
            ``enable_gradient_release`` during the backward pass. They pass through 512 MiB of pinned memory, or what the
            largest weight and its gradient take. ``step()`` waits until they are back, and for ``found_inf`` of a
            GradScaler. Not with ``capturable`` or DTensor parameters (FSDP2).
        isolation_granularity: of persistent masks, not of what a refresh selects. "element", "row" (along dim 0) or "block"
            (4,096 neighbours, row-major): masks of whole rows or blocks, whose elements have no moments and no importance
            (u = 0) and whose gradients the step does not read; p counts them all the same, and takes its share from the
            others. State is kept in runs, where that saves memory; a parameter's moments are flat then in ``state``, and
            whole in ``state_dict()``, on the host. Not with ``capturable``, ``offload``, 4-bit states or DTensor parameters.

    Over several ranks: where a parameter is a DTensor (FSDP2's ``fully_shard``, tensor parallelism) all ranks select
    together, and ``step()``, ``refresh_isolation_mask()``, ``set_isolation_mask()`` and ``load_state_dict()`` are calls
    of all of them; else each selects by itself, which is right for ``DistributedDataParallel``. ``set_process_group``
    names other ranks.

    Raises:
        ValueError: an argument is out of range; names the argument, the value and what is allowed.
        RuntimeError: a backend asked for by name cannot run, with the reason.
        NotImplementedError: ZeroRedundancyOptimizer makes it, or parameters are laid out in a way that is not supported.

    Source: EPI, arXiv 2604.14010 (Evolving Parameter Isolation).
    """

    # never copied or pickled
    _plan: StepPlan | OffloadedPlan | None = None  # kept from step to step
    _replayed: ReplayedSteps | None = None  # beside it, with capturable=True
    _release: GradientRelease | None = None  # set by enable_gradient_release
    _pipeline: HostPipeline | None = None  # with offload

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        isolation_ratio: float | RatioSchedule = 0.01,
        mask_interval: int | IntervalSchedule | None = 100,
        mask_warmup: int | None = None,
        importance_beta: float | None = None,
        importance_dtype: torch.dtype | str = torch.float32,
        normalization: str = "minmax",
        scope: str = "global",
        layer_key: Callable[[str], Any] | None = None,
        hysteresis: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
        master_weight_bits: int = 16,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        backend: str = "auto",
        offload: str | None = None,
        isolation_granularity: str = "element",
    ) -> None:
        ranks.check_maker()
        arguments.check_torch_options(
            amsgrad=amsgrad,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "isolate": True,
            "importance_beta": importance_beta,
        }
        arguments.check_group_options(defaults)
        self._config = arguments.make_config(
            isolation_ratio=isolation_ratio,
            mask_interval=mask_interval,
            mask_warmup=mask_warmup,
            importance_dtype=importance_dtype,
            normalization=normalization,
            scope=scope,
            layer_key=layer_key,
            hysteresis=hysteresis,
            state_dtype=state_dtype,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            backend=backend,
            capturable=capturable,
            offload=offload,
            isolation_granularity=isolation_granularity,
        )
        self._world: World | None = None
        self._report: IsolationReport | None = None
        self._skipped = SkippedSteps()
        self._captured = Captured()
        self._warned_nothing_selected = False
        self._given = Given()  # the parameters of all groups
        self._given_lr_0 = False  # some group
        self._step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
        super().__init__(params, defaults)
        warn_unused_importance_dtype(self.param_groups, self._config.importance_dtype)

    # ---------------------------------------------------------------- groups and names

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch; the group may set what the class docstring lists, and is checked before it joins.

        Raises:
            ValueError: an option is out of range or not a group's, a parameter has a dtype that no backend steps,
                or a name is missing where ``layer_key`` needs one, or taken.
            NotImplementedError: a parameter is sharded in a way that is not supported, with what to use instead.
            RuntimeError: the backend asked for cannot step a parameter.
        """
        group = arguments.checked_param_group(param_group, self.defaults, self._config)
        names = {entry.name: entry.param for entry in self._parameters()}
        check_parameters(group["params"], names, self._config)
        group[_STEP] = self.param_groups[0][_STEP] if self.param_groups else 0
        group[VERSION_KEY] = STATE_VERSION
        schedules.join_schedules(group, self.param_groups, self._config)
        super().add_param_group(group)
        self._given.add(self.param_groups[-1]["params"])
        self._given_lr_0 = self._given_lr_0 or float(self.param_groups[-1]["lr"]) == 0

    def _parameters(self) -> Iterator[Entry]:
        return list_entries(self.param_groups)

    @property
    def _isolation_step(self) -> int:
        return self.param_groups[0][_STEP]

    def _set_isolation_step(self, value: int) -> None:
        for group in self.param_groups:
            group[_STEP] = value

    def set_process_group(self, group: Any) -> None:
        """Which ranks (a ``torch.distributed`` group) select together, for pipeline stages whose parameters are plain
        tensors, or where only some of all ranks train. A call of all of them, before the first step.

        Names tell parameters apart: what two ranks hold under one name is one parameter, and counts once.

        Raises:
            ValueError: it is no group of this rank's, or parameters have no names.
        """
        ranks.check_named(self.param_groups)
        self._world = World(group)

    # ---------------------------------------------------------------- the step

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimization step; refreshes the mask after it when one is due. Returns the closure's loss.

        Raises:
            RuntimeError: a gradient is sparse or does not fit its parameter, state does not fit it, or a CUDA
                graph is being captured without ``capturable=True``. Nothing has changed then.
            ValueError: a schedule gives a ratio or an interval that is not allowed; likewise.
        """
        captured = is_captured(capturable=self._config.capturable)
        release, loss = self._release, None
        if release is not None:
            release.refuse_scaler()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if captured:
            stepping.captured_step(self)
        elif release is not None and release.is_open:
            release.finish()
        else:
            stepping.step_at_once(self)
        if release is not None:
            release.end_step()
        return loss

    def _adopt_state(self) -> None:
        stepping.adopt_state(self, [param for group in self.param_groups for param in group["params"]])

    def _forget_plans(self) -> None:
        """And the state they hold; the ranks compare where they are before the next step."""
        self._plan = self._replayed = None
        if self._world is not None:
            self._world.forget()
        if self._release is not None:
            self._release.forget()

    def _refuse_in_a_step(self, what: str) -> None:
        if self._release is not None:
            self._release.refuse_while_open(what)

    def _device(self) -> torch.device:
        """Where what is reduced over devices and ranks lies."""
        if self._config.offload is not None and self._world is None:
            return HOST
        return next((entry.param.device for entry in self._parameters()), torch.device("cpu"))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch."""
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.forget_accumulated()

    # ---------------------------------------------------------------- T, where a device may skip steps

    def _refresh_may_follow(self) -> bool:
        """Whether a refresh follows the step at hand, for any number of steps that were skipped unread."""
        return schedules.refresh_may_follow(self._config, self.param_groups[0], self._skipped.unread)

    def _settle(self) -> None:
        """Takes what was skipped off T; waits for the device."""
        counted = steps_done(self._isolation_step, self._skipped, self._replayed)
        if counted != self._isolation_step:
            self._set_isolation_step(counted)

    # ---------------------------------------------------------------- the refresh

    @uncompiled
    @torch.no_grad()
    def refresh_isolation_mask(self) -> IsolationReport:
        """Refreshes the mask now, whatever T; returns what it did. Schedules adapt nothing and stay as planned."""
        self._refuse_in_a_step("refresh_isolation_mask()")
        return stepping.refresh_now(self)

    def isolation_report(self) -> IsolationReport | None:
        """Figures of the last refresh, None before the first. Nothing synchronises until they are read."""
        return self._report

    # ---------------------------------------------------------------- masks

    def isolation_mask(self, param: Tensor) -> Tensor:
        """bool tensor of param's shape (a DTensor with its placements where it is one), a copy: True where the weight is
        isolated.

        Raises:
            ValueError: the parameter is in no group.
        """
        entry_of(param, self.param_groups)
        self._adopt_state()
        return unpacked_mask(whole_masks(self.state.get(param, {}), param), param)

    @uncompiled
    @torch.no_grad()
    def set_isolation_mask(self, param: Tensor, mask: Tensor, *, persistent: bool = False) -> None:
        """Installs a mask (bool, param's shape and device) until the next refresh, or for good.

        For a DTensor: one with its mesh and placements, or the whole mask on every rank; a call of all ranks, which
        send nothing in it.

        Persistent bits are OR-ed in after every selection, beside k and not out of it, and work with
        ``isolation_ratio=0`` and ``isolate=False`` too. An all-False one lifts it (a DTensor leaves it empty). Where rows or
        blocks have no state (``isolation_granularity``), those that are released begin with moments of 0 at their
        parameter's ``step``.

        Raises:
            TypeError: the mask is no dense bool tensor.
            ValueError: its shape or device is not the parameter's, the parameter is in no group, or a persistent mask is
                not of whole rows or blocks where ``isolation_granularity`` asks for them.
            NotImplementedError: such a mask for a DTensor.
        """
        self._refuse_in_a_step("set_isolation_mask()")
        entry, config = entry_of(param, self.param_groups), self._config
        check_mask(mask, param)
        if persistent:
            check_granularity(mask, param, config, entry.name)
        self._adopt_state()
        state = self.state[param]
        state_.complete_state(state, param, entry.group, config)
        self.state[param] = change_whole(
            state,
            param,
            config,
            lambda whole: install_mask(whole, param, mask, config, persistent=persistent),
        )

    @uncompiled
    @torch.no_grad()
    def carry_importance(self, source: Optimizer | dict[str, Any]) -> None:
        """Starts a new stage from another optimizer's statistics, so that old abilities stay protected.

        ``source`` is a MaskedEMAAdamW or torch.optim.AdamW, or the state_dict of one, matched by name, else by
        position, all or nothing. A shared importance takes the source's own importance if it has one, else its
        ``exp_avg_sq``, together with ``step``; an own importance takes that tensor alone. ``exp_avg`` starts at
        zero, T at 0, schedules as new; corrections of weights (``master_weight_bits``) go along. It does not
        refresh: call ``refresh_isolation_mask()`` to protect from the first step on.

        Raises:
            TypeError: the source is neither an optimizer nor a state dict.
            ValueError: a parameter has no counterpart there, or one of another shape, or there is no state at all.
        """
        self._refuse_in_a_step("carry_importance()")
        saving.carry_from(self, source)

    # ---------------------------------------------------------------- saving and loading

    def master_weight(self, param: Tensor) -> Tensor:
        """float32 tensor of param's shape, a copy: the weight the step computes with, correction included.

        Raises:
            ValueError: the parameter is in no group.
            RuntimeError: its state does not fit it.
        """
        entry = entry_of(param, self.param_groups)
        self._adopt_state()
        stepping.drain(self)  # it may be on its way
        state = self.state.get(param, {})
        check_state(entry, state, self._config)
        return master_weight(param, state)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the state, by kind, scales with what they scale; ``other`` are the step counters.

        With ``offload`` they are bytes of host memory. Tensors below 4,096 elements have float32 moments where codes are
        asked for, and are counted so.
        """
        return state_.bytes_by_kind(self.state.values())

    def state_dict(self) -> dict[str, Any]:
        """As torch. Under a GradScaler on a GPU it waits for the device: T is exact here.

        Of a DTensor, masks, codes and their scales are DTensors of its shape, so that they reshard. Of plain
        parameters, masks that a fresh optimizer's dict has no key for are in ``isolation_version`` of their group as well;
        it also tells what states there are. Before the first step all that train have one, if any does.
        """
        saving.complete_template(self)
        return self._state_dict_as_it_is()

    def _state_dict_as_it_is(self) -> dict[str, Any]:
        """What others take importance from: a parameter that was never stepped has no state there."""
        return saving.saved(self, super().state_dict)

    @uncompiled
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of ours or of torch.optim.AdamW (T becomes the largest ``step``), whole or not at all.

        By names (``torch.distributed.checkpoint``) lost masks come back from the groups; by numbers a warning tells of them.

        Raises:
            ValueError: it is of another parameter set or version, a tensor in it does not fit, or it has been through
                torch's calls and its states are not those that were saved; the optimizer is as before.
        """
        saving.load(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_captured", Captured())  # a copy has no graphs
        self._given = Given(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        saving.ready(self, "a copy")
        return super().__getstate__() | {name: self.__dict__[name] for name in _COPIED}
