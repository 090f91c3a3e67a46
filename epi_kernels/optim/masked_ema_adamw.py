"""MaskedEMAAdamW: torch.optim.AdamW with evolving parameter isolation inside the fused step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from epi_kernels.backends import capture
from epi_kernels.distributed import shards
from epi_kernels.distributed.world import World
from epi_kernels.optim import arguments, carry, ranks, schedules
from epi_kernels.optim import state as state_
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.captured import ReplayedSteps, check_capture
from epi_kernels.optim.corrections import master_weight
from epi_kernels.optim.entries import Entry, check_given, check_parameters, check_state
from epi_kernels.optim.masks import check_mask, install_mask
from epi_kernels.optim.plan import StepPlan
from epi_kernels.optim.refresh import StatsByDevice, partition, refresh
from epi_kernels.optim.report import IsolationReport, warn_nothing_selected
from epi_kernels.optim.sharded_state import exported
from epi_kernels.optim.skipped import SkippedSteps
from epi_kernels.policies.layers import LayerTable, Share, build_layers
from epi_kernels.policies.schedule import IntervalSchedule, RatioSchedule
from epi_kernels.reference import bits

_STEP, _VERSION = state_.STEP_KEY, state_.VERSION_KEY


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
        importance_dtype: of an own importance: torch.float32, torch.bfloat16 or "int8".
        normalization: within a layer: "minmax", "zscore" or "none".
        scope: "global" ranks all layers together, "layer" each by itself.
        layer_key: name -> hashable; parameters of one value form a layer. Needs named parameters.
        hysteresis: h in [0, 1): scores of isolated elements are divided by 1 - h before selection.
        state_dtype: of exp_avg and exp_avg_sq; None is the parameter's. torch.float32, torch.bfloat16 or "int8":
            8-bit floats under a scale a block of 64; tensors below 4,096 elements keep float32.
        master_weight_bits: of bfloat16 weights: 16; 24 or 32 keep an 8- or 16-bit correction beside each, with which
            the step computes as with float32 weights (24: rounded to 16 bits of mantissa). Other weights have none.
        stochastic_rounding: of bfloat16 weights and of bfloat16 and 8-bit states; None means on.
        seed: of the stochastic rounding.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Over several ranks: where a parameter is a DTensor (FSDP2's ``fully_shard``, tensor parallelism) all ranks select
    together, and ``step()``, ``refresh_isolation_mask()`` and ``load_state_dict()`` are calls of all of them; else each
    selects by itself, which is right for ``DistributedDataParallel``. ``set_process_group`` names other ranks.

    Raises:
        ValueError: an argument is out of range; names the argument, the value and what is allowed.
        RuntimeError: a backend asked for by name cannot run, with the reason.

    Source: EPI, arXiv 2604.14010 (Evolving Parameter Isolation).
    """

    _plan: StepPlan | None = None  # kept from step to step; never copied or pickled
    _replayed: ReplayedSteps | None = None  # beside it, with capturable=True

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
    ) -> None:
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
        )
        self._world: World | None = None
        self._report: IsolationReport | None = None
        self._skipped = SkippedSteps()
        self._warned_nothing_selected = False
        self._n_given = 0  # parameters, of all groups
        self._given_lr_0 = False  # some group
        self._step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
        super().__init__(params, defaults)

    # ---------------------------------------------------------------- groups and names

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch; the group may set what the class docstring lists, and is checked before it joins.

        Raises:
            ValueError: an option is out of range or not a group's, a parameter has a dtype that no backend steps,
                or a name is missing where ``layer_key`` needs one, or taken.
            NotImplementedError: a parameter is sharded in a way that is not supported, with what to use instead.
            RuntimeError: the backend asked for cannot step a parameter.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        arguments.check_param_group(group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        check_parameters(
            group["params"],
            {entry.name: entry.param for entry in self._parameters()},
            requested_backend=self._config.backend,
            needs_names=self._config.layer_key is not None,
            capturable=self._config.capturable,
        )
        group[_STEP] = self.param_groups[0][_STEP] if self.param_groups else 0
        group[_VERSION] = state_.STATE_VERSION
        schedules.join_schedules(group, self.param_groups, self._config)
        super().add_param_group(group)
        self._n_given += len(self.param_groups[-1]["params"])
        self._given_lr_0 = self._given_lr_0 or float(self.param_groups[-1]["lr"]) == 0

    def _parameters(self) -> Iterator[Entry]:
        """Every parameter in order; unnamed ones go by position."""
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                name = f"param_{position}" if names is None else names[i]
                yield Entry(group, param, name, position if names is None else zlib.crc32(name.encode()))
                position += 1

    @property
    def _isolation_step(self) -> int:
        return self.param_groups[0][_STEP]

    def _set_isolation_step(self, value: int) -> None:
        for group in self.param_groups:
            group[_STEP] = value

    def set_process_group(self, group: Any) -> None:
        """Which ranks (a ``torch.distributed`` group) select together, for pipeline stages whose parameters are plain
        tensors, or where only some of all ranks train. A call of all of them, before the first step."""
        self._world = World(group)

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimization step; refreshes the mask after it when one is due. Returns the closure's loss.

        Raises:
            RuntimeError: a gradient is sparse or does not fit its parameter, state does not fit it, or a CUDA
                graph is being captured. Nothing has changed then.
            ValueError: a schedule gives a ratio or an interval that is not allowed; likewise.
        """
        if capture.capturing():
            return self._captured_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # both set by torch.amp.GradScaler
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        params = [param for group in self.param_groups for param in group["params"]]
        self._join_ranks(params)
        grads, alike = self._grads(params)
        if self._makes_a_template(grads):
            self._step_plan(params, grads, written=False)
            return loss
        # what a refresh may refuse is looked at before anything changes
        may_refresh, now = self._refresh_may_follow(), None
        if may_refresh:
            self._settle()
            found_inf = None if found_inf is None else found_inf.cpu()  # the host waits once
            now = None if found_inf else schedules.due_settings(self._config, self.param_groups[0])
        layers = None if now is None else self._layers(now)
        plan = self._step_plan(params, grads, written=grad_scale is not None, alike=alike)
        if found_inf is not None and (may_refresh or not plan.counts_on_device):
            self._settle()
            if bool(found_inf):
                return loss
            found_inf = None

        stats = None if layers is None else StatsByDevice(len(layers.names), self._config)
        plan.run(grads, grad_scale=grad_scale, found_inf=found_inf, layers=layers, stats=stats)
        self._set_isolation_step(self._isolation_step + 1)
        if found_inf is not None:  # the device knows whether it was a step
            self._skipped.note(found_inf)
        if now is not None and layers is not None and stats is not None:
            self._refresh(layers, stats, now, covered=plan.covered(), due=True)
        return loss

    def _captured_step(self, closure: Callable[[], Any] | None) -> Any:
        """A step that a graph will replay: nothing is waited for, no refresh, T by the device's count."""
        if not self._config.capturable:
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph: make the optimizer with capturable=True"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        params = [param for group in self.param_groups for param in group["params"]]
        grads, alike = self._grads(params)
        plan = self._plan
        check_capture(plan, plan is not None and plan.fits(params, grads, self.state, alike=alike))
        assert plan is not None
        plan.run(grads, grad_scale=grad_scale, found_inf=found_inf, layers=None, stats=None)
        return loss

    def _step_plan(
        self, params: list[Tensor], grads: list[Tensor | None], *, written: bool, alike: bool = False
    ) -> StepPlan:
        """The last plan while it fits: building one costs milliseconds where there are hundreds of tensors."""
        if self._plan is None or not self._plan.fits(params, grads, self.state, alike=alike):
            self._plan = None
            check_given(self.param_groups, self._n_given)
            entries = list(self._parameters())
            if self._world is not None and not self._world.agreed:
                held = ranks.holdings(entries, self._config)
                self._world.agree(held, ranks.settings(self._config), self._device())
            if self._config.capturable:
                self._settle()
            self._plan = StepPlan(entries, grads, self.state, self._config, written=written)
            step = self._plan.a_step() if self._config.capturable else None
            self._replayed = None if step is None else ReplayedSteps(step, self._isolation_step)
        return self._plan

    def _join_ranks(self, params: Sequence[Tensor]) -> None:
        """Accelerate puts DTensors in the place of parameters that an optimizer was made with."""
        if self._world is None and shards.any_sharded(params):
            self._world = World()

    def _grads(self, params: list[Tensor]) -> tuple[list[Tensor | None], bool]:
        """The gradients; of sharded parameters, what lies on this rank, and whether all are known to fit them."""
        grads = [param.grad for param in params]
        if self._world is None:
            return grads, False
        return shards.local_grads(params, grads)

    def _device(self) -> torch.device:
        """Where what is reduced over devices and ranks lies."""
        for entry in self._parameters():
            return entry.param.device
        return torch.device("cpu")

    def _makes_a_template(self, grads: list[Tensor | None]) -> bool:
        """Whether this is no step of a training run: ``torch.distributed.checkpoint`` makes the state of a fresh
        optimizer by one with lr 0 and gradients 0, and the state must come out as if it had not."""
        fresh = self._isolation_step == 0 and not any(self.state.values())
        if not fresh or self._given_lr_0 or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        moves = any(bool(grad.any()) for grad in grads if grad is not None)
        return not (moves if self._world is None else self._world.any(moves, self._device()))

    # ---------------------------------------------------------------- T, where a device may skip steps

    def _refresh_may_follow(self) -> bool:
        """Whether a refresh follows the step at hand, for any number of steps that were skipped unread."""
        return schedules.refresh_may_follow(self._config, self.param_groups[0], self._skipped.unread)

    def _settle(self) -> None:
        """Takes what was skipped off T; waits for the device."""
        skipped = self._skipped.read() if self._skipped.unread else 0
        if self._replayed is not None:
            self._set_isolation_step(self._replayed.isolation_step())
        elif skipped:
            self._set_isolation_step(self._isolation_step - skipped)

    # ---------------------------------------------------------------- the refresh

    def _layers(self, now: IsolationConfig) -> LayerTable:
        entries = list(self._parameters())
        self._join_ranks([entry.param for entry in entries])
        for entry in entries:  # what a refresh would stumble over
            arguments.check_group_options({"isolate": entry.group["isolate"]})
            check_state(entry, self.state.get(entry.param, {}))
        world = self._world
        if world is not None:
            settings, held = ranks.settings(now), ranks.holdings(entries, self._config)
            world.open_refresh(held, settings, self._isolation_step, self._device())
            return world.layers({name: param for _, param, name, _ in entries})
        layer_of = self._config.layer_key or (lambda name: name)
        return build_layers(
            Share(param, name, param.numel(), layer_of(name), group["isolate"])
            for group, param, name, _ in entries
        )

    @torch.no_grad()
    def refresh_isolation_mask(self) -> IsolationReport:
        """Refreshes the mask now, whatever T; returns what it did. Schedules adapt nothing and stay as planned."""
        self._settle()
        now = schedules.settings_at(self._config, self.param_groups[0], self._isolation_step)
        layers = self._layers(now)
        return self._refresh(layers, StatsByDevice(len(layers.names), now), now, covered=set(), due=False)

    def _refresh(
        self, layers: LayerTable, stats: StatsByDevice, now: IsolationConfig, covered: set[Tensor], due: bool
    ) -> IsolationReport:
        """Stages 2 to 4, with the numbers in ``now``; ``covered``: parameters whose stats the step has reduced."""
        entries = [entry for entry in self._parameters() if entry.param.numel() > 0]
        partitions, stateless = partition(entries, self.state, layers, covered, now)
        step, device = self._isolation_step, self._device()
        self._report = refresh(partitions, layers, stateless, stats, now, step, self._world, device)
        schedules.after_refresh(now, self.param_groups, self._report, due=due)
        self._warn_after_refresh(self._report, layers)
        return self._report

    def _warn_after_refresh(self, report: IsolationReport, layers: LayerTable) -> None:
        if report.selects_nothing and report.ratio > 0 and not self._warned_nothing_selected:
            self._warned_nothing_selected = True
            warn_nothing_selected(report.ratio, layers.total_eligible)
        # reading the count warns; on a GPU it stays there until somebody reads it
        if all(param.device.type == "cpu" for param in layers.row_of):
            _ = report.nonfinite

    def isolation_report(self) -> IsolationReport | None:
        """Figures of the last refresh, None before the first. Nothing synchronises until they are read."""
        return self._report

    # ---------------------------------------------------------------- masks

    def _entry_of(self, param: Tensor) -> Entry:
        for entry in self._parameters():
            if entry.param is param:
                return entry
        raise ValueError("this parameter is not in any of the optimizer's groups")

    def isolation_mask(self, param: Tensor) -> Tensor:
        """bool tensor of param's shape (a DTensor with its placements where it is one), a copy: True where the weight is
        isolated.

        Raises:
            ValueError: the parameter is in no group.
        """
        weight = self._entry_of(param).weight
        packed = self.state.get(param, {}).get("isolation_mask")
        if packed is None:
            mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        else:
            mask = bits.unpack(packed, weight.numel()).view(weight.shape)
        return shards.wrap(mask, param)

    @torch.no_grad()
    def set_isolation_mask(self, param: Tensor, mask: Tensor, *, persistent: bool = False) -> None:
        """Installs a mask (bool, param's shape and device) until the next refresh, or for good.

        For a DTensor: one with its mesh and placements, or the whole mask on every rank.

        Persistent bits are OR-ed in after every selection, beside k and not out of it, and work with
        ``isolation_ratio=0`` and ``isolate=False`` too. Installing an all-False persistent mask lifts it.

        Raises:
            TypeError: the mask is no dense bool tensor.
            ValueError: its shape or device is not the parameter's, or the parameter is in no group.
        """
        group = self._entry_of(param).group
        check_mask(mask, param)
        state = self.state[param]
        state_.complete_state(state, param, group, self._config)
        install_mask(state, param, mask, persistent=persistent)

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
        entries = list(self._parameters())
        params = [param for _, param, _, _ in entries]
        named = all("param_names" in group for group in self.param_groups)
        names = [name for _, _, name, _ in entries] if named else None
        carried = carry.match_source(source, params, names)
        fresh = carry.fresh_states(entries, carried, self.state, self._config)
        self._plan = self._replayed = None  # and the state they hold
        for param, state in zip(params, fresh, strict=True):
            if state:
                self.state[param] = state
            else:
                self.state.pop(param, None)
        self._skipped.read()
        self._set_isolation_step(0)
        schedules.start_schedules(self.param_groups, self._config)

    # ---------------------------------------------------------------- saving and loading

    def master_weight(self, param: Tensor) -> Tensor:
        """float32 tensor of param's shape, a copy: the weight the step computes with, correction included.

        Raises:
            ValueError: the parameter is in no group.
            RuntimeError: its state does not fit it.
        """
        entry, state = self._entry_of(param), self.state.get(param, {})
        check_state(entry, state)
        return master_weight(param, state)

    def state_bytes(self) -> dict[str, int]:
        """Bytes this optimizer owns, by kind, scales with what they scale; ``other`` are the step counters."""
        return state_.bytes_by_kind(self.state.values())

    def state_dict(self) -> dict[str, Any]:
        """As torch. Under a GradScaler on a GPU it waits for the device: T is exact here.

        Of a DTensor, masks and the scales of 8-bit states are DTensors of its shape, so that they reshard.
        """
        self._settle()
        found = super().state_dict()
        params = dict.fromkeys(param for group in self.param_groups for param in group["params"])
        for number, param in enumerate(params):
            if shards.is_sharded(param) and number in found["state"]:
                found["state"][number] = exported(found["state"][number], param)
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of ours or of torch.optim.AdamW; one that does not fit is refused whole.

        torch's own policy would cast importances to the parameter's dtype and packed masks to floats.

        Raises:
            ValueError: it is of another parameter set or version, or a tensor in it does not fit; the optimizer is
                as before.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        state, groups = self._read(state_dict)
        self._plan = self._replayed = None  # and the state they hold
        self.__setstate__({"state": state, "param_groups": groups})
        self._report, self._skipped = None, SkippedSteps()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read(self, state_dict: Mapping[str, Any]) -> tuple[Any, Any]:
        """``read_state_dict``, by all ranks or by none."""
        self._join_ranks([entry.param for entry in self._parameters()])
        found, refused = None, None
        try:
            found = state_.read_state_dict(state_dict, self.param_groups, self._config)
        except Exception as error:
            refused = error
        if self._world is not None and self._world.any(refused is not None, self._device()):
            refused = refused or ValueError(
                "another rank refused the state dict: nothing was loaded here either"
            )
        if refused is not None:
            raise refused
        assert found is not None
        return found

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = (
            "_config",
            "_world",
            "_report",
            "_skipped",
            "_n_given",
            "_given_lr_0",
            "_warned_nothing_selected",
            "_step_supports_amp_scaling",
        )
        return super().__getstate__() | {name: self.__dict__[name] for name in own}
