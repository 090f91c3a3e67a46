"""`epi-kernels importance`: which weights old abilities need, measured on data that stands for them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from . import chat, data, model, packing
from .checkpoint import DiskFull
from .errors import UserError
from .importance import FORMAT, STATISTIC, VERSION, Accumulator
from .job import answer_loss
from .options import DTYPES
from .packing import ATTENTION
from .prepare import encode_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Forward and backward passes only: no weight changes. What is written is the mean over batches of the squared batch gradient; "
        "that is not a per-sample Fisher, for gradients inside a batch are added before they are squared (--batch-size 1 "
        "--no-packing comes closest)."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="local checkpoint directory or hub name"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="OLD.jsonl",
        help="data that stands for the old abilities, in finetune's forms",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="IMP.safetensors",
        help="float32 importance by parameter name; finetune's --protect takes it",
    )
    parser.add_argument("--tokenizer", help="directory or hub name, when it is not the model's")
    parser.add_argument("--batch-size", type=int, default=4, metavar="ROWS", help="rows a batch [4]")
    parser.add_argument(
        "--max-batches", type=int, metavar="N", help="stop after this many batches [all data once]"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="tokens a row [1024, or what the model takes]"
    )
    parser.add_argument("--template", choices=("chat", "raw"), default="chat", help="as in finetune [chat]")
    parser.add_argument("--no-packing", dest="packing", action="store_false", help="one example a row")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and gradients [the checkpoint's]")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time"
    )
    parser.add_argument(
        "--attention", choices=ATTENTION, default="sdpa", help="attention implementation [sdpa]"
    )
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="order of the data [0]")
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 written, 1 the disk is full, 2 something given is wrong, 130 interrupted (nothing written)."""
    try:
        return _run(args)
    except (UserError, DiskFull) as error:
        print(f"epi-kernels importance: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130


def _check(args: argparse.Namespace) -> Path:
    out = Path(args.out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "importance is measured by one process: start it without torchrun or accelerate launch"
        )
    for name in ("batch_size", "max_batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if model.is_config(args.model):
        raise UserError(
            f"--model {args.model}: a config has random weights, which have no old abilities; give a checkpoint"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; name a file")
    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out} exists; --overwrite replaces it")
    if not out.resolve().parent.is_dir() or not os.access(out.resolve().parent, os.W_OK):
        raise UserError(f"--out {out}: its directory does not exist or is not writable")
    return out


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    out = _check(args)
    model.quiet_libraries()
    examples = data.read_jsonl(args.data)
    device = model.pick_device(args.device)
    config = model.load_config(args.model)
    tokenizer = model.load_tokenizer(args.model, args.tokenizer, config.get_text_config().vocab_size, ())
    if chat.ensure_template(tokenizer):
        print("the tokenizer has no chat template: a plain one is used")
    rows, encoding = encode_rows(
        tokenizer, examples, args.data, model.row_length(config, args.max_length), args, args.seed
    )
    print(f"data: {encoding.counts}")
    net = model.load_model(
        args.model,
        config,
        model.model_dtype(config, args.dtype, args.model),
        args.attention,
        device,
        args.seed,
    )
    # Dropout off: the importance is of the model as it is used.
    net.eval()
    if args.packing:
        packing.assert_no_leak(net, tokenizer.vocab_size, args.attention)
    if args.gradient_checkpointing:
        # Checkpointing is active in training mode only; dropout is silenced one by one instead.
        model.enable_checkpointing(net)
        net.train()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()

    schedule = packing.Schedule(len(rows.rows), args.batch_size, 1, args.seed)
    batches = min(args.max_batches or schedule.steps_per_epoch, schedule.steps_per_epoch)
    pad_id = model.pad_id(tokenizer)
    named = dict(net.named_parameters())
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "statistic": STATISTIC,
        "batches": str(batches),
        "batch_size": str(args.batch_size),
        "examples": str(
            sum(
                len(rows.rows[row])
                for step in range(batches)
                for batch in schedule.micro_batches(step)
                for row in batch
            )
        ),
        "structure": model.structure_fingerprint(net),
        "weights": model.weights_fingerprint(net),
        "data": encoding.sha256(),
        "model": os.path.basename(os.path.normpath(args.model)),
    }
    with Accumulator(
        out, {name: parameter.shape for name, parameter in named.items()}, metadata
    ) as accumulator:

        def keep(name: str):
            def hook(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None  # it was accumulated just now
                accumulator.add(name, parameter.grad)
                parameter.grad = None  # freed at once: the model's gradient never exists as a whole

            return hook

        for name, parameter in named.items():
            parameter.register_post_accumulate_grad_hook(keep(name))
        quiet = args.quiet or not sys.stderr.isatty()
        for step in tqdm(range(batches), desc="importance", unit="batch", disable=quiet):
            (indices,) = schedule.micro_batches(step)
            loss, answers = answer_loss(
                net, rows.batch(indices, pad_id, args.packing, device, args.attention)
            )
            if not torch.isfinite(loss):
                raise UserError(f"batch {step + 1}: the loss is {float(loss)}; nothing was written", status=1)
            (loss / answers).backward()
        accumulator.divide(batches)
    size = out.stat().st_size
    print(
        f"{out}: {len(named)} tensors, {size / 2**20:.1f} MiB, from {metadata['examples']} examples in {batches} batches"
    )
    print(
        "it holds the mean squared gradient of batches, which is not a per-sample Fisher; finetune --protect takes it"
    )
    return 0
