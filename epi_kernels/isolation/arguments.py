"""The command line of `isolate`."""

from __future__ import annotations

import argparse

from .fusion import EPS, MAX_SHARD_BYTES, METHODS
from .grouping import TAU
from .staging import ORDERS

SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """'5GB' -> 5000000000; an argparse type."""
    digits = text.rstrip("BKMGbkmg")
    try:
        return round(float(digits) * SIZES[text[len(digits) :].upper()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 500MB or 5GB, say") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "CPI-FT (arXiv 2508.21741): fine-tune on each task alone, take each run's core, group the tasks, fuse their models, then train "
        "on with the cores frozen (`epi-kernels finetune --freeze`). epi-kernels isolate ACTION --help describes an action's arguments."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _core(actions.add_parser("core", help="the core region of a task: the weights that its run moved most"))
    _groups(
        actions.add_parser("groups", help="overlap of cores, groups of tasks, and the order of their stages")
    )
    _fuse(actions.add_parser("fuse", help="one model of several: cores as they are, all else blended"))


def _core(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The floor(p D) weights of D with the largest |tuned - base|, as packed masks; those that tie are all in, those that did not "
        "move never. Both checkpoints are read slice by slice, three times."
    )
    _checkpoint(parser, "--base", "the checkpoint that the run began from")
    _checkpoint(parser, "--tuned", "the checkpoint that it ended with")
    parser.add_argument("--ratio", type=float, default=0.01, metavar="P", help="share of all weights [0.01]")
    parser.add_argument("--out", required=True, metavar="CORE.safetensors", help="the core region")
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --out")
    _quiet(parser)


def _groups(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Similarity of every two cores (Jaccard), groups as connected components of those at or above tau, and the stages in order, "
        "with what each freezes."
    )
    parser.add_argument("cores", nargs="+", metavar="CORE", help="core regions, one a task")
    parser.add_argument(
        "--tau", type=float, default=TAU, help=f"similarity that joins two tasks; 0: one group [{TAU}]"
    )
    parser.add_argument(
        "--order",
        choices=ORDERS,
        default="random",
        help="of the groups; frozen: smallest frozen sets first; curriculum: easiest first [random]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random order [0]")
    parser.add_argument(
        "--difficulty", type=float, nargs="+", metavar="D", help="of each task, for --order curriculum"
    )
    parser.add_argument(
        "--frozen",
        choices=("earlier", "all"),
        default="earlier",
        help="what a stage freezes: the cores of earlier groups, or all; the paper says both [earlier]",
    )
    parser.add_argument(
        "--single-stage", action="store_true", help="all groups in one stage (with --frozen all)"
    )
    parser.add_argument("--json", metavar="FILE", help="the same as JSON")


def _fuse(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a checkpoint with every task's core values, and all else blended tensor by tensor, streamed: no model is ever whole "
        "in memory. Dtype, config and tokenizer are the base's."
    )
    _checkpoint(
        parser, "--base", "what is fused into: in the paper, the model after the last group's training"
    )
    parser.add_argument(
        "--tuned",
        required=True,
        nargs="+",
        metavar="DIR",
        help="the tasks' own models, in the order of fusion",
    )
    parser.add_argument(
        "--core",
        nargs="+",
        default=[],
        metavar="CORE",
        help="their core regions, in the same order; where two overlap the later task's values stay [none: all is blended]",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="slerp", help="of what is outside all cores [slerp]"
    )
    parser.add_argument(
        "--omega",
        type=float,
        help="weight of each task when it is blended in [1/2, 1/3, ...: equal shares]",
    )
    parser.add_argument(
        "--eps",
        type=float,
        default=EPS,
        metavar="RADIANS",
        help=f"tensors at a smaller angle are blended linearly [{EPS:.4f}]",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="of a weight file [5GB]",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the fused model; must not exist, or be empty"
    )
    _quiet(parser)


def _checkpoint(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(
        flag, required=True, metavar="DIR", help=f"{text} (directory with safetensors, or one such file)"
    )


def _quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
