"""The command line of `finetune`."""

from __future__ import annotations

import argparse

from .options import BACKENDS, DTYPES, IMPORTANCE_DTYPES, MASTER_WEIGHT_BITS, OFFLOADS, STATE_DTYPES, Options
from .packing import ATTENTION
from .trackers import CHOICES as TRACKERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. No defaults in the parser: `Options` has them, so that --resume can tell given from left out."""
    defaults = Options()

    def add(group, flag: str, text: str, **extra) -> None:
        name = flag.lstrip("-").replace("-", "_")
        value = getattr(defaults, name, None)
        shown = f" [{value}]" if "action" not in extra and value not in (None, "") else ""
        group.add_argument(flag, default=argparse.SUPPRESS, help=text + shown, **extra)

    group = parser.add_argument_group("what to train on")
    add(
        group,
        "--model",
        "local checkpoint directory, hub name, or a config .json (random weights)",
        metavar="DIR_OR_CONFIG",
    )
    add(
        group,
        "--data",
        "JSONL: messages, prompt/completion, or Alpaca's instruction/input/output",
        metavar="FILE.jsonl",
    )
    add(group, "--out", "directory for the model, checkpoints and log", metavar="DIR")
    add(
        group,
        "--tokenizer",
        "directory or hub name, when it is not the model's; a config without one gets a byte-level BPE made from the data",
    )
    add(group, "--validation", "JSONL to validate on, in place of a split of --data", metavar="FILE.jsonl")
    add(group, "--validation-split", "share of --data held out", type=float, metavar="SHARE")
    add(
        group,
        "--max-length",
        "tokens a row; longer examples are cut [1024, or what the model takes]",
        type=int,
        metavar="TOKENS",
    )
    add(
        group,
        "--template",
        "chat: all forms through the chat template; raw: prompt and completion joined as they stand",
        choices=("chat", "raw"),
    )
    group.add_argument(
        "--no-packing",
        dest="packing",
        action="store_false",
        default=argparse.SUPPRESS,
        help="one example a row",
    )
    group = parser.add_argument_group("old abilities")
    add(
        group,
        "--protect",
        "importance file (`epi-kernels importance`, or `save_isolation`) or the directory of a previous run: isolates from the first step",
        metavar="IMP|RUN_DIR",
    )
    add(
        group,
        "--protect-steps",
        "carried importance counts as this many steps of evidence; many make the first updates overshoot [1/(1-beta1)]",
        type=int,
        metavar="STEPS",
    )
    add(
        group,
        "--freeze",
        "core regions (`epi-kernels isolate core`) whose weights never change, whatever the isolation ratio",
        nargs="+",
        metavar="CORE",
    )
    add(
        group,
        "--retain",
        "JSONL of the old abilities: its loss is measured before, during and after",
        metavar="OLD.jsonl",
    )
    add(group, "--retain-examples", "measure on at most this many of them; 0: all", type=int, metavar="N")
    add(
        group,
        "--compare",
        "run plain AdamW beside it (same seed, same order of data) in OUT/adamw",
        action="store_true",
    )
    group = parser.add_argument_group("isolation")
    add(
        group,
        "--isolation-ratio",
        "share of the weights that is isolated; 0 is plain AdamW",
        type=float,
        metavar="P",
    )
    add(group, "--mask-interval", "steps between two refreshes of the mask", type=int, metavar="H")
    add(group, "--mask-warmup", "steps before the first refresh [H]", type=int, metavar="STEPS")
    add(
        group,
        "--adaptive-interval",
        "from H on longer while masks agree, shorter when they drift, within these",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
    )
    add(
        group,
        "--adaptive-ratio",
        "from P on larger while masks agree, smaller when they drift, within these",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
    )
    add(
        group,
        "--importance-beta",
        "decay of an importance of its own [share exp_avg_sq]",
        type=float,
        metavar="BETA",
    )
    add(group, "--importance-dtype", "of an own importance", choices=IMPORTANCE_DTYPES)
    add(group, "--normalization", "of importance inside a layer", choices=("minmax", "zscore", "none"))
    add(group, "--scope", "one threshold for all layers, or one for each", choices=("global", "layer"))
    add(
        group, "--layer-key", "what a layer is: a tensor, or a transformer block", choices=("tensor", "block")
    )
    add(group, "--hysteresis", "advantage of the elements now isolated", type=float, metavar="H")
    add(group, "--state-dtype", "of exp_avg and exp_avg_sq [the weights']", choices=STATE_DTYPES)
    add(
        group,
        "--master-weight-bits",
        "of bfloat16 weights in the optimizer: what is above 16 lies beside them",
        type=int,
        choices=MASTER_WEIGHT_BITS,
    )
    add(
        group,
        "--stochastic-rounding",
        "on every low-precision tensor written [on]",
        action=argparse.BooleanOptionalAction,
    )
    add(group, "--backend", "which implementation steps", choices=BACKENDS)
    add(
        group,
        "--offload",
        "cpu: optimizer states lie in host memory and are stepped there, with the same bits [on the device]",
        choices=OFFLOADS,
    )
    add(
        group,
        "--gradient-release",
        "step each parameter as its gradient comes, and free that: no clipping, so with --max-grad-norm 0",
        action="store_true",
    )
    add(
        group,
        "--fit",
        "choose what fits a card of so many GB (10^9 bytes): --dtype, --state-dtype, --master-weight-bits, --offload, "
        "--gradient-checkpointing and --gradient-release, as `epi-kernels memory --card` lists them",
        type=float,
        metavar="GB",
    )
    group = parser.add_argument_group("training")
    add(group, "--epochs", "passes over the data", type=int, metavar="N")
    add(group, "--max-steps", "stop after this many steps (the schedule ends there)", type=int, metavar="N")
    add(group, "--batch-size", "rows a forward pass", type=int, metavar="ROWS")
    add(group, "--accumulation", "forward passes a step", type=int, metavar="N")
    add(group, "--lr", "peak learning rate", type=float)
    add(group, "--weight-decay", "of matrices; norms and biases have none", type=float, metavar="W")
    add(group, "--beta1", "decay of exp_avg", type=float, metavar="B")
    add(group, "--beta2", "decay of exp_avg_sq", type=float, metavar="B")
    add(group, "--eps", "added to the root of exp_avg_sq", type=float)
    add(group, "--max-grad-norm", "clip the gradient's norm to this; 0: never", type=float, metavar="NORM")
    add(
        group,
        "--warmup-ratio",
        "share of the steps with a rising learning rate, before the cosine",
        type=float,
        metavar="SHARE",
    )
    add(group, "--min-lr-ratio", "where the cosine ends, as a share of --lr", type=float, metavar="SHARE")
    add(group, "--dtype", "of weights and gradients [the checkpoint's; fp32 for a config]", choices=DTYPES)
    add(
        group,
        "--gradient-checkpointing",
        "recompute activations: less memory, more time",
        action="store_true",
    )
    add(
        group,
        "--attention",
        "attention implementation; all of these keep packed examples apart",
        choices=ATTENTION,
    )
    add(
        group,
        "--fsdp",
        "started by torchrun or accelerate launch: weights, gradients and states lie over the ranks (FSDP2) [all on each]",
        action=argparse.BooleanOptionalAction,
    )
    add(group, "--device", "auto: cuda where there is one, else cpu; of several ranks each has its own")
    add(group, "--seed", "of everything random", type=int)
    group = parser.add_argument_group("the run")
    add(
        group,
        "--resume",
        "continue the run in --out, bit for bit; other arguments may be left out",
        action="store_true",
    )
    add(group, "--overwrite", "delete the run in --out first", action="store_true")
    add(group, "--dry-run", "print memory, steps and refreshes due; write nothing", action="store_true")
    add(group, "--log-every", "steps between two lines of the log", type=int, metavar="STEPS")
    add(
        group,
        "--log-to",
        "what gets the log's scalars too, beside OUT/log.jsonl [tensorboard where it is installed]",
        nargs="+",
        choices=TRACKERS,
    )
    add(
        group, "--eval-every", "steps between two evaluations [a tenth of the run]", type=int, metavar="STEPS"
    )
    add(group, "--checkpoint-every", "steps between two checkpoints", type=int, metavar="STEPS")
    add(group, "--keep-checkpoints", "checkpoints kept", type=int, metavar="N")
    add(group, "--quiet", "no progress bar", action="store_true")
