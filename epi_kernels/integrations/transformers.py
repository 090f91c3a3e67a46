"""``transformers.Trainer``, and whatever derives from it: the Trainer's own arguments arrive, with the parameters' names.

    trainer = Trainer(
        model, args, train_dataset=data, optimizer_cls_and_kwargs=masked_ema_adamw(args, isolation_ratio=0.01)
    )
    add_isolation_callback(trainer, carry=earlier_optimizer)
    trainer.train()

``optimizer_cls_and_kwargs=(MaskedEMAAdamW, {...})`` alone would train with MaskedEMAAdamW's default lr and betas, for
the Trainer hands a class its keyword arguments and nothing else, and without names.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, is_tensorboard_available

from epi_kernels.curves import isolation_scalars
from epi_kernels.integrations.groups import Patterns, named_parameter_groups
from epi_kernels.optim import IsolationReport, MaskedEMAAdamW
from epi_kernels.optim.wrapped import inside

FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


class OptimizerFactory:
    """What the Trainer makes and then calls with its model."""

    def __call__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        groups: dict[str, Any],
        options: dict[str, Any],
    ) -> MaskedEMAAdamW:
        # the installed Trainer's own rule, which asks nothing of the Trainer
        decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        return MaskedEMAAdamW(
            named_parameter_groups(model, weight_decay=args.weight_decay, decaying=decaying, **groups),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            **options,
        )


def masked_ema_adamw(
    args: TrainingArguments,
    *,
    isolate: Patterns | None = None,
    no_isolate: Patterns | None = None,
    **options: Any,
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    ``isolate``, ``no_isolate``: which parameters take part, as in ``named_parameter_groups``. ``options``: of
    MaskedEMAAdamW, but what ``args`` hold.

    Raises:
        ValueError: an option that is one of the TrainingArguments.
    """
    twice = [f"{name} ({FROM_ARGUMENTS[name]})" for name in options if name in FROM_ARGUMENTS]
    if twice:
        raise ValueError(f"set {', '.join(twice)} in the TrainingArguments, which the optimizer reads")
    groups = {"isolate": isolate, "no_isolate": no_isolate}
    return OptimizerFactory, {"args": args, "groups": groups, "options": options}


class IsolationCallback(TrainerCallback):
    """Protects from the first step on, and logs every refresh wherever the Trainer logs."""

    def __init__(self, trainer: Trainer, carry: torch.optim.Optimizer | dict[str, Any] | None = None) -> None:
        self._trainer, self._carry = trainer, carry
        self._logged: IsolationReport | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        ours = _unwrapped(optimizer)
        # a resumed run has its importance, unless its checkpoint is without the optimizer (save_only_model)
        if self._carry is not None and (state.global_step == 0 or not any(ours.state.values())):
            ours.carry_importance(self._carry)
            ours.refresh_isolation_mask()
            self._log(ours.isolation_report())
        self._carry = None  # an optimizer's state is as large as ours: not kept
        self._logged = ours.isolation_report()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        report = _unwrapped(optimizer).isolation_report()
        if report is not self._logged:
            due = control.should_log
            self._log(report)
            control.should_log = due  # which a log line lowers: the Trainer's own of this step would be lost
            self._logged = report

    def _log(self, report: IsolationReport | None) -> None:
        if report is not None:
            self._trainer.log(isolation_scalars(report.as_dict()))


def add_isolation_callback(
    trainer: Trainer,
    carry: torch.optim.Optimizer | dict[str, Any] | None = None,
    *,
    tensorboard: bool | None = None,
) -> IsolationCallback:
    """Adds the callback to a Trainer whose optimizer is ours.

    Args:
        carry: the optimizer of an earlier stage, or its state dict (``MaskedEMAAdamW.carry_importance``); its importance
            is taken over and a mask selected before the first step; also of a run resumed without its optimizer's state.
        tensorboard: whether the Trainer writes TensorBoard's event files. None: where it reports nowhere else
            (``report_to``) and tensorboard is installed. W&B and the others that ``report_to`` names get the same scalars.
    """
    callback = IsolationCallback(trainer, carry)
    trainer.add_callback(callback)
    if tensorboard is None:
        tensorboard = not trainer.args.report_to and is_tensorboard_available()
    there = any(isinstance(one, TensorBoardCallback) for one in trainer.callback_handler.callbacks)
    if tensorboard and not there:
        trainer.add_callback(TensorBoardCallback)
    return callback


def _unwrapped(optimizer: Any) -> MaskedEMAAdamW:
    ours = inside(optimizer)
    if not isinstance(ours, MaskedEMAAdamW):
        raise TypeError(
            f"the Trainer steps with {type(ours).__name__}: pass optimizer_cls_and_kwargs=masked_ema_adamw(args, ...)"
        )
    return ours
