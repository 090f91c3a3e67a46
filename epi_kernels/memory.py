"""`epi-kernels memory`: what a model and each optimizer's state take, from the model's config alone.

With ``--card`` the configuration that fits (epi_kernels/planner).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epi_kernels import architectures, footprint, published
from epi_kernels.files import write_whole
from epi_kernels.planner import command as planner
from epi_kernels.text import columns

GB = 10**9
CARDS_GB = (24, 40, 80, 141)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LEFT_OUT = (
    "activations",
    "temporary buffers (float32 gradients for master weights are such)",
    "the CUDA context",
)
BUILT_IN = ", ".join(architectures.ARCHITECTURES)

EIGHT_BIT: dict[str, Any] = {"state_dtype": "int8"}
FOUR_BIT: dict[str, Any] = {"state_dtype": "int4"}
# Any importance_beta but beta2 gives the importance a tensor of its own.
OWN_IMPORTANCE: dict[str, Any] = {"importance_beta": 0.9, "importance_dtype": "int8"}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, 8-bit states": EIGHT_BIT,
    "ours, 4-bit states": FOUR_BIT,
    "ours, 8-bit states and importance of its own": EIGHT_BIT | OWN_IMPORTANCE,
}
OURS_BFLOAT16: dict[str, dict[str, Any]] = {  # other weights have every bit
    "ours, 8-bit states, 24-bit weights": EIGHT_BIT | {"master_weight_bits": 24},
    "ours, 4-bit states, 24-bit weights": FOUR_BIT | {"master_weight_bits": 24},
    "ours, 32-bit weights": {"master_weight_bits": 32},
}


@dataclass(frozen=True)
class Row:
    """An optimizer's bytes beside weights and gradients; ``refresh`` are those that a refresh of its mask adds.

    ``counted``: tensor by tensor; else bytes a parameter, as published, times the number of parameters.
    """

    name: str
    state: int
    refresh: int = 0
    counted: bool = True


def rows(sizes: Sequence[int], dtype: torch.dtype, isolated_rows: float | None = None) -> list[Row]:
    """Every optimizer over parameters of so many elements, their weights and gradients held in ``dtype``.

    ``isolated_rows``: the share of every tensor that further lines of ours leave without state.
    """
    n = sum(sizes)
    found = [Row("torch AdamW", footprint.adamw(sizes, dtype)["total"])]
    if dtype == torch.bfloat16:
        master = n * torch.float32.itemsize + footprint.adamw(sizes, torch.float32)["total"]
        found.append(Row("torch AdamW, float32 master weights and states", master))
    found.append(
        Row("EPI as published", n * published.STATE_TOTAL_BYTES, n * published.REFRESH_BYTES, counted=False)
    )
    for name, options in ours(dtype).items():
        found.append(Row(name, footprint.masked_ema_adamw(sizes, dtype, **options)["total"]))
    if isolated_rows is not None:
        for name, options in ours(dtype).items():
            if options.get("state_dtype") == "int4":
                continue  # whose rows have state all the same
            kinds = footprint.masked_ema_adamw(sizes, dtype, **options, isolated_rows_share=isolated_rows)
            found.append(Row(f"{name}, {100 * isolated_rows:g} % of rows isolated", kinds["total"]))
    peers = published.PEER_STATE_BYTES
    if dtype == torch.bfloat16:
        peers = peers | published.PEER_STATE_BYTES_BFLOAT16
    return found + [Row(name, round(n * per), counted=False) for name, per in peers.items()]


def ours(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The configurations of ours that are listed, by name: options of MaskedEMAAdamW."""
    return OURS | OURS_BFLOAT16 if dtype == torch.bfloat16 else OURS


def model_config(model: str) -> Any:
    """A transformers config.

    Raises:
        UserError: ``model`` is no directory, config file, known name or name on the hub.
    """
    from transformers import AutoConfig

    from epi_kernels.finetune.model import load_config, quiet_libraries

    quiet_libraries()
    known = None if os.path.exists(model) else architectures.find(model)
    return load_config(model) if known is None else AutoConfig.for_model(**known)


def model_sizes(model: str) -> list[int]:
    """Elements of each parameter of a model, tied ones once; the model is built on the meta device.

    Raises:
        UserError: as ``model_config``, or its config makes no model.
    """
    return _config_and_sizes(model)[1]


def _config_and_sizes(model: str) -> tuple[Any, list[int]]:
    from epi_kernels.finetune.model import only_shapes_matter, sizes_of

    with only_shapes_matter():
        config = model_config(model)
        return config, sizes_of(config)


def report(
    model: str, sizes: Sequence[int], dtype_name: str, isolated_rows: float | None = None
) -> dict[str, Any]:
    """The whole report, ready for JSON. Bytes, but for the cards' names: GB of 10^9."""
    dtype = DTYPES[dtype_name]
    weights = sum(sizes) * dtype.itemsize
    optimizers = []
    for row in rows(sizes, dtype, isolated_rows):
        total = 2 * weights + row.state + row.refresh
        optimizers.append(
            {
                "name": row.name,
                "state_bytes": row.state,
                "refresh_bytes": row.refresh,
                "total_bytes": total,
                "counted": row.counted,
                "left_bytes": {str(card): card * GB - total for card in CARDS_GB},
                "fits": [card for card in CARDS_GB if total <= card * GB],
            }
        )
    return {
        "model": model,
        "dtype": dtype_name,
        "parameters": sum(sizes),
        "tensors": len(sizes),
        "weights_bytes": weights,
        "gradients_bytes": weights,
        "left_out": list(LEFT_OUT),
        "optimizers": optimizers,
    }


def format_report(facts: dict[str, Any]) -> str:
    """The report as aligned text."""
    weights = facts["weights_bytes"]
    digits = 2 if weights >= GB else 6  # a small model's states would all be 0.00

    def gb(count: int) -> str:
        return f"{count / GB:.{digits}f}"

    header = ["optimizer", "a parameter", "state", "refresh", "sum", *(f"{card} GB" for card in CARDS_GB)]
    lines = [header]
    for row in facts["optimizers"]:
        lines.append(
            [
                row["name"] + ("" if row["counted"] else " *"),
                f"{row['state_bytes'] / facts['parameters']:.3f}",
                gb(row["state_bytes"]),
                f"+{gb(row['refresh_bytes'])}" if row["refresh_bytes"] else "0",
                gb(row["total_bytes"]),
                *(f"{left / GB:.2f}" if left >= 0 else "-" for left in row["left_bytes"].values()),
            ]
        )
    return (
        f"{facts['model']}: {facts['parameters']:,} parameters in {facts['tensors']} tensors, {facts['dtype']}\n"
        f"weights {gb(weights)} GB, gradients {gb(weights)} GB (1 GB = 10^9 bytes); with each optimizer, in GB:\n\n"
        f"{columns(lines, rule=True)}\n\n"
        "a parameter: bytes of state. refresh: added while the mask is refreshed. sum: with weights and gradients.\n"
        f"{CARDS_GB[0]} GB to {CARDS_GB[-1]} GB: what is left over on a card of that size, - where the sum does not fit. It must hold\n"
        f"what the sum leaves out: {', '.join(LEFT_OUT)}.\n"
        "* computed from the bytes a parameter of its source, not measured; the others are counted tensor by tensor."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_CONFIG",
        help=f"a directory or config.json, a name on the hub, or one of {BUILT_IN}",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16", help="of weights and gradients [bfloat16]"
    )
    parser.add_argument(
        "--isolated-rows",
        type=_share,
        metavar="SHARE",
        help="further lines of ours with isolation_granularity='row': this share of every tensor, in rows, isolated for good",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="as JSON, in bytes: to FILE beside the table, or without FILE in the table's place",
    )
    planner.add_arguments(parser)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1, not {text}")
    return share


def run(args: argparse.Namespace) -> int:
    """Raises SystemExit with what to do when the model cannot be found or FILE cannot be written."""
    from epi_kernels.finetune.errors import UserError

    planner.check(args)
    try:
        config, sizes = _config_and_sizes(args.model)
        if args.card is not None:
            facts, text = planner.run(args, config, sizes)
        else:
            facts = report(args.model, sizes, args.dtype, args.isolated_rows)
            text = format_report(facts)
    except UserError as error:
        raise SystemExit(
            f"epi-kernels memory: {error}. Give a directory or a config.json (this needs no network), "
            f"or one of {BUILT_IN}"
        ) from None
    record = json.dumps(facts, indent=2)
    if args.json == "-":
        print(record)
        return 0
    print(text)
    if args.json is not None:
        try:
            write_whole(Path(args.json), record + "\n")
        except OSError as error:
            raise SystemExit(
                f"epi-kernels memory: --json {args.json}: {error.strerror}; give a file that can be written"
            ) from None
    return 0
