"""The closing table: what was learned and what it cost on the old data, one line a run."""

from __future__ import annotations

from collections.abc import Mapping

from epi_kernels.text import columns, human_bytes

NAMES = {"isolation": "MaskedEMAAdamW", "adamw": "torch.optim.AdamW"}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def table(results: Mapping[str, Mapping]) -> str:
    """`results`: done.json by label. Losses in nats an answer token; a positive change on the old data is forgetting."""
    headers = ("loss (nats/token)", "validation", "old before", "old after", "change", "state")
    lines: list[tuple[str, ...]] = [headers]
    for label, result in results.items():
        before, after = result["retain_loss_before"], result["retain_loss_after"]
        change = "-" if before is None or after is None else f"{after - before:+.4f}"
        lines.append(
            (
                NAMES[label],
                _number(result["validation_loss"]),
                _number(before),
                _number(after),
                change,
                human_bytes(result["state_bytes"]["total"]),
            )
        )
    return columns(lines)
