"""Stage 1 of offloaded parameters: what a step may refuse is looked at, then each goes its way through the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.backends import choose
from epi_kernels.backends.batch import StepBatch
from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.entries import Entry, param_tensors
from epi_kernels.optim.home import HOST
from epi_kernels.optim.offload.pipeline import Compute, HostPipeline
from epi_kernels.optim.plan import check_step
from epi_kernels.optim.refresh import StatsByDevice, reduce_stats
from epi_kernels.optim.state import complete_state
from epi_kernels.policies.layers import LayerTable


class OffloadedPlan:
    """As ``StepPlan``, for one step: beside the copies it costs nothing to make a new one.

    Raises:
        RuntimeError: a gradient or a state that no backend steps; nothing has changed then.
        ValueError: a param group's value is out of range.
    """

    counts_on_device = False

    def __init__(
        self,
        entries: Sequence[Entry],
        grads: Sequence[Tensor | None],  # of the entries
        state_of: Mapping[Tensor, dict[str, Any]],
        config: IsolationConfig,
        pipeline: HostPipeline,
        *,
        written: bool,  # a loss scale will be divided out of the gradients
    ) -> None:
        self._stepped, _, self._hyper_of = check_step(entries, grads, state_of, config, written=written)
        self._config, self._pipeline, self._state_of = config, pipeline, state_of
        for entry in self._stepped:
            complete_state(state_of[entry.param], entry.param, entry.group, config)

    def is_over(self, _: Sequence[Tensor]) -> bool:
        """Never known: what it has looked at may have changed."""
        return False

    def fits(self, *_: Any, alike: bool) -> bool:
        return False

    def run(
        self,
        grads: Sequence[Tensor | None],
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        layers: LayerTable | None,
        stats: StatsByDevice | None,
    ) -> None:
        """Begins the step of every entry; ``HostPipeline.drain`` ends it. With ``stats`` it is ended here, and layer
        statistics are reduced."""
        assert found_inf is None, "the host has looked"
        scale = None if grad_scale is None else grad_scale.to(HOST)
        # copies come later, and autograd must notice now that saved weights change
        torch.autograd.graph.increment_version([entry.param for entry in self._stepped])
        present = [grad for grad in grads if grad is not None]
        for entry, grad in zip(self._stepped, present, strict=True):
            compute = self._compute(entry, scale)
            self._pipeline.submit(entry.weight, grad, compute, writes_grad=scale is not None)
        if stats is not None and layers is not None:
            self._pipeline.drain()
            reduce_stats(self._stepped, self._state_of, layers, stats, self._config)

    def covered(self) -> set[Tensor]:
        """The parameters whose stats a step with stats reduces."""
        return {entry.param for entry in self._stepped}

    def _compute(self, entry: Entry, grad_scale: Tensor | None) -> Compute:
        """What steps one parameter when its weight and gradient have come."""
        config, group, state = self._config, entry.group, self._state_of[entry.param]
        tensors = param_tensors(entry.param, state, group, layer=-1)
        tensors.step, tensors.rng_id = state["step"], entry.rng_id
        tensors.hyper, tensors.maximize = self._hyper_of[id(group)], group["maximize"]
        backend = choose(config.backend, HOST, entry.param.dtype).backend

        def compute(weight: Tensor, grad: Tensor) -> None:
            tensors.param = weight
            batch = StepBatch([tensors])
            batch.grads = [grad]
            backend.step(
                batch,
                seed=config.seed,
                stochastic_rounding=config.stochastic_rounding,
                grad_scale=grad_scale,
            )

        return compute
