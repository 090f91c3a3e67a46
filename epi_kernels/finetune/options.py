"""Every option of `finetune` in one dataclass: its defaults, checks, and what a resumed run may change."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from epi_kernels.files import partial_of

from . import trackers
from .errors import UserError
from .packing import ATTENTION

DTYPES = ("fp32", "bf16")
IMPORTANCE_DTYPES = ("fp32", "bf16", "int8")
STATE_DTYPES = (*IMPORTANCE_DTYPES, "int4")
MASTER_WEIGHT_BITS = (16, 24, 32)
BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
OFFLOADS = ("cpu",)
# These change how a run is watched, kept and computed; the weights it ends with at most in the last bits (--fsdp).
FREE_ON_RESUME = (
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "log_to",
    "quiet",
    "backend",
    "offload",
    "fsdp",
    "resume",
    "overwrite",
    "dry_run",
)
PATHS = ("data", "validation", "retain", "out")


@dataclass
class Options:
    """The arguments of `finetune`; None means "decided from the model or the data", as the help says."""

    model: str = ""
    data: str = ""
    out: str = ""
    tokenizer: str | None = None
    validation: str | None = None
    validation_split: float = 0.05
    retain: str | None = None
    retain_examples: int = 1000
    protect: str | None = None
    protect_steps: int | None = None
    freeze: list[str] | None = None
    compare: bool = False
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    max_length: int | None = None
    template: str = "chat"
    packing: bool = True
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 2e-5
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    dtype: str | None = None
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    device: str = "auto"
    seed: int = 0
    isolation_ratio: float = 0.01
    mask_interval: int = 100
    mask_warmup: int | None = None
    adaptive_interval: list[int] | None = None
    adaptive_ratio: list[float] | None = None
    importance_beta: float | None = None
    importance_dtype: str = "fp32"
    normalization: str = "minmax"
    scope: str = "global"
    layer_key: str = "tensor"
    hysteresis: float = 0.0
    state_dtype: str | None = None
    master_weight_bits: int = 16
    stochastic_rounding: bool | None = None
    backend: str = "auto"
    offload: str | None = None
    gradient_release: bool = False
    fit: float | None = None
    fsdp: bool = False
    log_every: int = 1
    log_to: list[str] | None = None
    eval_every: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    quiet: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace, saved: dict | None = None) -> Options:
        """The given arguments over the saved run's (`--resume`) over the defaults. Refuses what would change a resumed run."""
        given = {
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(cls)
            if hasattr(args, field.name)
        }
        for name in PATHS:
            if given.get(name):
                given[name] = os.path.abspath(given[name])
        for name in ("model", "tokenizer", "protect"):
            # Absolute, so that --resume works from anywhere; a hub name stays as it is.
            if given.get(name) and os.path.exists(given[name]):
                given[name] = os.path.abspath(given[name])
        if given.get("freeze"):
            given["freeze"] = [os.path.abspath(path) for path in given["freeze"]]
        if saved is None:
            return cls(**given).checked()
        changed = [
            f"--{name.replace('_', '-')} was {saved.get(name)!r}, is {value!r}"
            for name, value in given.items()
            if name not in (*FREE_ON_RESUME, "out") and value != saved.get(name)
        ]
        if changed:
            raise UserError(
                "cannot resume with other arguments:\n  "
                + "\n  ".join(changed)
                + "\nleave them out, or start anew in another --out"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{**{name: value for name, value in saved.items() if name in known}, **given}).checked()

    def checked(self) -> Options:
        """self, or UserError naming the argument, its value and what is allowed."""
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise UserError(f"--{name} is required (only `--out DIR --resume` does without the others)")

        def need(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}; allowed: {allowed}")

        for name in (
            "epochs",
            "batch_size",
            "accumulation",
            "mask_interval",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            need(name, getattr(self, name) >= 1, "1 or more")
        for name in ("max_steps", "protect_steps", "mask_warmup", "eval_every"):
            need(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        need("max_length", self.max_length is None or self.max_length >= 2, "2 or more")
        need("seed", -(1 << 63) <= self.seed < 1 << 63, "64 bits")
        need("retain_examples", self.retain_examples >= 0, "0 (all) or more")
        for name in ("lr", "weight_decay", "eps"):
            need(name, getattr(self, name) >= 0, "0 or more")
        need("max_grad_norm", self.max_grad_norm >= 0, "0 (no clipping) or more")
        need("fit", self.fit is None or 0 < self.fit < math.inf, "more than 0 GB")
        for name in (
            "validation_split",
            "beta1",
            "beta2",
            "isolation_ratio",
            "hysteresis",
            "warmup_ratio",
            "min_lr_ratio",
        ):
            need(name, 0 <= getattr(self, name) < 1, "0 or more and less than 1")
        need(
            "importance_beta",
            self.importance_beta is None or 0 <= self.importance_beta < 1,
            "0 or more and less than 1",
        )
        need("attention", self.attention in ATTENTION, ", ".join(ATTENTION))
        if self.hysteresis > 0 and self.normalization == "zscore":
            raise UserError(
                "--hysteresis works on scores that are not negative: not with --normalization zscore"
            )
        for name, start in (("adaptive_interval", "mask_interval"), ("adaptive_ratio", "isolation_ratio")):
            bounds, begins = getattr(self, name), getattr(self, start)
            if bounds is not None:
                low, high = bounds
                inside = 0 < low <= begins <= high and (name == "adaptive_interval" or high < 1)
                below = "" if name == "adaptive_interval" else " and below 1"
                flag = f"--{start.replace('_', '-')}"
                need(name, inside, f"MIN and MAX above 0{below}, with {flag} ({begins}) between them")
        if self.protect is not None and self.isolation_ratio == 0:
            raise UserError("--protect with --isolation-ratio 0 protects nothing: give a ratio above 0")
        if self.protect_steps is not None and self.protect is None:
            raise UserError("--protect-steps says how much --protect weighs: give --protect too")
        if self.importance_dtype != "fp32" and self.importance_beta in (None, self.beta2):
            raise UserError(
                "--importance-dtype is of an importance of its own, and there is none: give --importance-beta other than "
                f"--beta2 ({self.beta2:g}), or --state-dtype, which a shared one has"
            )
        if self.offload is not None and self.fsdp:
            raise UserError(
                "--offload keeps whole parameters' states: not with --fsdp, where each rank holds its share of them"
            )
        if self.gradient_release and self.max_grad_norm > 0:
            raise UserError(
                f"--gradient-release frees gradients before their norm is known: not with --max-grad-norm {self.max_grad_norm:g}, "
                "give 0 (no clipping)"
            )
        if self.gradient_release and self.compare:
            raise UserError(
                "--compare trains with torch's AdamW too, which has no --gradient-release: leave one of them out"
            )
        trackers.chosen(self.log_to)
        if self.resume and self.overwrite:
            raise UserError("--resume continues what --overwrite deletes: give one of them")
        return self

    def saved(self) -> dict:
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("resume", "overwrite", "dry_run")
        }


def check_out(options: Options) -> None:
    """Refuses an output directory that holds something, before anything is written."""
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a directory")
    # What a kill left of a run's first file is not a run, and nothing to keep.
    if not out.exists() or all(path == partial_of(out / "run.json") for path in out.iterdir()):
        parent = next(p for p in (out, *out.parents) if p.exists())
        if not parent.is_dir():
            raise UserError(f"--out {out}: {parent} is a file, not a directory")
        if not os.access(parent, os.W_OK):
            raise UserError(f"--out {out}: {parent} is not writable")
        return
    ours = (out / "run.json").is_file()
    if options.overwrite:
        read = [
            (name, getattr(options, name))
            for name in ("model", "tokenizer", "data", "validation", "retain", "protect")
        ]
        for name, value in [*read, *(("freeze", path) for path in options.freeze or ())]:
            if value and os.path.exists(value) and Path(value).resolve().is_relative_to(out.resolve()):
                raise UserError(f"--overwrite would delete --{name} {value}: choose another --out")
        if not ours:
            raise UserError(
                f"--out {out} holds something that is not a fine-tuning run; --overwrite deletes only those: empty it yourself"
            )
        return
    raise UserError(
        f"--out {out} is not empty: "
        + ("--resume continues it, --overwrite replaces it" if ours else "choose another")
    )
