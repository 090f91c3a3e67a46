"""Schedules of the mask interval and the isolation ratio, in the optimizer.

What they remember lies in every param group as plain numbers, beside T, so that a resume finds it; the callables
never do. Constant settings remember nothing and have none of these keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from epi_kernels.optim.arguments import IsolationConfig
from epi_kernels.optim.report import IsolationReport
from epi_kernels.policies.checks import check_interval, check_ratio, is_int, require
from epi_kernels.policies.schedule import (
    AdaptiveInterval,
    AdaptiveRatio,
    agreement,
    may_be_due,
    refresh_due,
)

STEP_KEY = "isolation_step"  # T
NEXT_KEY = "isolation_next_refresh"  # T of the next refresh, where a schedule sets the interval
INTERVAL_KEY = "isolation_interval_now"  # H that holds, likewise
RATIO_KEY = "isolation_ratio_now"  # p of the next refresh, where it adapts
LAST_KEY = "isolation_last_refresh"  # T of the last refresh, -1 before the first, where anything adapts
KEYS = (NEXT_KEY, INTERVAL_KEY, RATIO_KEY, LAST_KEY)


def first_schedules(config: IsolationConfig) -> dict[str, Any]:
    """What a param group holds before the first step."""
    held: dict[str, Any] = {}
    if config.interval_schedule is not None:
        # a warm-up of 0 is a refresh of nothing at T = 0, as with a constant interval
        held[NEXT_KEY] = config.mask_warmup or config.mask_interval
        held[INTERVAL_KEY] = config.mask_interval
    if isinstance(config.ratio_schedule, AdaptiveRatio):
        held[RATIO_KEY] = config.isolation_ratio
    if config.adapts:
        held[LAST_KEY] = -1
    return held


def join_schedules(
    group: dict[str, Any], groups: Sequence[Mapping[str, Any]], config: IsolationConfig
) -> None:
    """A new group comes to hold what the others hold, and nothing that another optimizer's schedules left in it."""
    held = first_schedules(config)
    held.update({key: groups[0][key] for key in held if groups})
    _hold([group], held)


def start_schedules(groups: Iterable[dict[str, Any]], config: IsolationConfig) -> None:
    """As before the first step."""
    _hold(groups, first_schedules(config))


def _hold(groups: Iterable[dict[str, Any]], held: Mapping[str, Any]) -> None:
    for group in groups:
        for key in KEYS:
            group.pop(key, None)
        group.update(held)


def refresh_may_follow(config: IsolationConfig, group: Mapping[str, Any], unread: int) -> bool:
    """Whether a refresh may follow the step at hand, where none to all of ``unread`` steps were skipped."""
    if not config.isolates:
        return False
    last = group[STEP_KEY] + 1
    if config.interval_schedule is not None:
        return last >= group[NEXT_KEY]
    return may_be_due(last - unread, last, interval=config.mask_interval, warmup=config.mask_warmup)


def due_settings(config: IsolationConfig, group: Mapping[str, Any]) -> IsolationConfig | None:
    """The settings of the refresh that is due after the step at hand; None where none is.

    Raises:
        ValueError: a callable gives what is not allowed. Nothing has changed.
    """
    step = group[STEP_KEY] + 1
    if config.interval_schedule is None:
        due = refresh_due(step, interval=config.mask_interval, warmup=config.mask_warmup)
        return settings_at(config, group, step) if due else None
    if step < group[NEXT_KEY]:  # T may have passed it: a state without a schedule was loaded
        return None
    settings = settings_at(config, group, step)
    if isinstance(config.interval_schedule, AdaptiveInterval):
        return settings
    interval = check_interval(f"mask_interval({step})", config.interval_schedule(step))
    return dataclasses.replace(settings, mask_interval=interval)


def settings_at(config: IsolationConfig, group: Mapping[str, Any], step: int) -> IsolationConfig:
    """The settings of a refresh at T = ``step``: the ratio and the interval that now holds, as numbers.

    Raises:
        ValueError: a callable gives what is not allowed. Nothing has changed.
    """
    ratio = config.isolation_ratio
    if isinstance(config.ratio_schedule, AdaptiveRatio):
        ratio = group[RATIO_KEY]
    elif config.ratio_schedule is not None:
        ratio = check_ratio(f"isolation_ratio({step})", config.ratio_schedule(step))
    interval = config.mask_interval if config.interval_schedule is None else group[INTERVAL_KEY]
    return dataclasses.replace(config, isolation_ratio=ratio, mask_interval=interval)


def after_refresh(
    settings: IsolationConfig, groups: Sequence[dict[str, Any]], report: IsolationReport, *, due: bool
) -> None:
    """Plans the next refresh. One that was not due adapts nothing and leaves the plan as it is."""
    held = {key: groups[0][key] for key in first_schedules(settings)}
    interval, ratio = settings.mask_interval, settings.isolation_ratio
    if due and held.get(LAST_KEY, -1) >= 0:  # the first mask has none before it
        overlap = _overlap(settings, report)
        if overlap is not None and interval is not None:
            if isinstance(settings.interval_schedule, AdaptiveInterval):
                interval = settings.interval_schedule.following(interval, overlap)
            if isinstance(settings.ratio_schedule, AdaptiveRatio):
                ratio = settings.ratio_schedule.following(ratio, overlap)
    report.interval = interval
    now = {INTERVAL_KEY: interval, RATIO_KEY: ratio, LAST_KEY: report.step}
    if due and interval is not None:
        now[NEXT_KEY] = report.step + interval
    for group in groups:
        group.update({key: now[key] for key in held if key in now})


def _overlap(settings: IsolationConfig, report: IsolationReport) -> float | None:
    """How far the new mask is the one before it. On a GPU this waits for the device."""
    if settings.ratio_schedule is None:
        return report.jaccard
    return agreement(report.isolated, report.entered, report.released)


def load_schedules(
    groups: Sequence[dict[str, Any]], saved_groups: Sequence[Mapping[str, Any]], config: IsolationConfig
) -> None:
    """What a state dict's groups hold of schedules, into loaded groups; what it lacks starts as new.

    An adaptive value saved under other bounds is brought within these.

    Raises:
        ValueError: a saved value is damaged.
    """
    held = first_schedules(config)
    saved = saved_groups[0] if saved_groups else {}
    held.update({key: saved[key] for key in held if key in saved})
    if NEXT_KEY in held:
        check_interval(NEXT_KEY, held[NEXT_KEY])
        held[INTERVAL_KEY] = check_interval(INTERVAL_KEY, held[INTERVAL_KEY])
    if isinstance(config.interval_schedule, AdaptiveInterval):
        held[INTERVAL_KEY] = config.interval_schedule.within(held[INTERVAL_KEY])
    if isinstance(config.ratio_schedule, AdaptiveRatio):
        held[RATIO_KEY] = config.ratio_schedule.within(check_ratio(RATIO_KEY, held[RATIO_KEY]))
    last = held.get(LAST_KEY, -1)
    require(is_int(last) and last >= -1, LAST_KEY, last, "an int >= 0, or -1 before the first refresh")
    if isinstance(config.interval_schedule, AdaptiveInterval) and last >= 0:
        held[NEXT_KEY] = min(held[NEXT_KEY], last + held[INTERVAL_KEY])
    _hold(groups, held)
