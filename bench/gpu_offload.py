"""make gpu-offload: full fine-tuning of a 7-to-9-billion-parameter model whose optimizer states lie in host memory.

First the tests of offload="cpu" on the device. Then whole training steps (forward, backward with gradient checkpointing,
step; one sequence) of the model, built from its config with random weights, with each way to hold its states: each in a
process of its own, so that one that runs out of memory costs its row and no other's. Ours offloaded may take no more of
the device than the card it is for has. What is done is kept beside the results, and the same command continues.

    python -m bench.gpu_offload --time-limit 540          as much as fits in the time
    python -m bench.gpu_offload --card 16 --model Llama-2-7B
    python -m bench.gpu_offload --device cpu --smoke      a tiny model: tests this program, times nothing

Exit status: 0 done or stopped in time; 1 a test failed, or ours offloaded did not fit; 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import results
from bench.contenders import LR
from bench.gpu import GPU_TESTS, TEST_SECONDS, run_pytest
from bench.gpu import outcome as outcome_of_tests
from bench.gpu_device import Device, add_arguments, device_of, versions
from bench.gpu_large import SMOKE_TOKENS, TINY, add_process_arguments, build, leave_row, ran, row_of
from bench.gpu_record import slug
from bench.side_by_side import stored_bytes
from bench.slices import Kept, Slice, run_slices
from bench.sources import kernel_hash
from epi_kernels import MaskedEMAAdamW, enable_gradient_release
from epi_kernels.architectures import ARCHITECTURES

SCHEMA = 1
STEPS, WARM_UP = 5, 2
TOKENS = 2048
SECONDS = 240  # of one arm, guessed: what --time-limit leaves must hold the next one
TESTS = "tests"


@dataclass(frozen=True)
class Arm:
    """A way to hold the optimizer's states."""

    name: str
    make: Callable[[nn.Module], torch.optim.Optimizer]
    note: str
    limited: bool = False  # to the card's memory
    isolates: bool = False

    @property
    def slug(self) -> str:
        return slug(self.name)


def _ours(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = MaskedEMAAdamW(
            model.named_parameters(), lr=LR, mask_interval=None, state_dtype="int8", **options
        )
        enable_gradient_release(model, optimizer)
        return optimizer

    return make


def _torchao(model: nn.Module) -> torch.optim.Optimizer:
    from torchao.optim import CPUOffloadOptimizer  # pyright: ignore[reportMissingImports]

    return CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=LR)


ARMS = [
    Arm("ours, 8-bit, offloaded", _ours(offload="cpu"), "states on the host", limited=True, isolates=True),
    Arm(
        "ours, 8-bit, 32-bit weights, offloaded",
        _ours(offload="cpu", master_weight_bits=32),
        "states and the weights' low 16 bits on the host",
        limited=True,
        isolates=True,
    ),
    Arm("ours, 8-bit, resident", _ours(), "states on the device", isolates=True),
    Arm(
        "torchao CPUOffloadOptimizer",
        _torchao,
        "torch's fused AdamW on the host, bfloat16 states; isolates nothing",
    ),
]


# ---------------------------------------------------------------- one arm, in its own process


def train(arm: Arm, config: dict[str, Any], device: Device, n_tokens: int, card_gb: float) -> dict[str, Any]:
    """Figures of some training steps in bfloat16; ``skipped`` where memory runs out or the peer cannot run."""
    on_gpu = device.type == "cuda"
    made = 0
    try:
        if on_gpu and arm.limited:
            share = card_gb * 1e9 / torch.cuda.get_device_properties(device.torch_device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.torch_device)
        model = build(config, device)
        made = sum(param.numel() for param in model.parameters())
        return {"parameters": made, **_steps(arm, model, device, config["vocab_size"], n_tokens)}
    except torch.OutOfMemoryError as error:
        return {"parameters": made, "skipped": f"out of memory: {str(error).splitlines()[0]}"[:200]}
    except Exception as error:  # a peer may fail in any way; the row says how
        return {"parameters": made, "skipped": f"{type(error).__name__}: {error}"[:200]}


def _steps(arm: Arm, model: nn.Module, device: Device, vocabulary: int, n_tokens: int) -> dict[str, Any]:
    generator = torch.Generator(device.torch_device).manual_seed(0)
    tokens = torch.randint(vocabulary, (1, n_tokens), generator=generator, device=device.torch_device)
    optimizer = arm.make(model)
    losses: list[float] = []
    backward_ms, step_ms = [], []
    for _ in range(WARM_UP + STEPS):
        device.synchronize()
        marks = [time.perf_counter()]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        marks.append(time.perf_counter())  # ours offloaded are stepped meanwhile
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        device.synchronize()
        marks.append(time.perf_counter())
        losses.append(loss.item())
        backward_ms.append((marks[1] - marks[0]) * 1e3)
        step_ms.append((marks[2] - marks[0]) * 1e3)
    found: dict[str, Any] = {
        "training_step_ms": results.percentiles(step_ms[WARM_UP:]),
        "until_backward_returns_ms": results.percentiles(backward_ms[WARM_UP:]),
        "tokens_per_s": n_tokens / (results.percentiles(step_ms[WARM_UP:])["p50"] / 1e3),
        "state_bytes": stored_bytes(optimizer.state_dict()),
        "losses": losses,
        **_peaks(device),
    }
    if arm.isolates:
        start = time.perf_counter()
        optimizer.refresh_isolation_mask()  # type: ignore[attr-defined]
        device.synchronize()
        found["refresh_ms"] = (time.perf_counter() - start) * 1e3
    return found


def _peaks(device: Device) -> dict[str, Any]:
    """The most that tensors held, and that the allocator held for them: a card must have the latter."""
    if device.type != "cuda":
        return {"peak_bytes": None, "peak_reserved_bytes": None}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device.torch_device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device.torch_device),
    }


# ---------------------------------------------------------------- the run


def in_subprocess(arm: Arm, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    arguments = ["--one", arm.slug, "--model", args.model, "--card", str(args.card), "--device", args.device]
    # a card that is nearly full has no room for the gaps between blocks of fixed sizes
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    smoke = ["--smoke"] if args.smoke else []
    return row_of("bench.gpu_offload", [*arguments, *smoke], seconds, environment)


def tests(device: Device, smoke: bool, seconds: float) -> dict[str, Any]:
    path = str(GPU_TESTS / "test_gpu_offload.py")
    arguments = ["-m", "gpu", f"--confcutdir={GPU_TESTS}", "--device", device.type, path]
    return run_pytest([*arguments, *(["-k", "comes_back"] if smoke else [])], seconds)


def outcome(row: dict[str, Any]) -> str:
    if "training_step_ms" not in row:
        return outcome_of_tests(row)
    peak = "" if row["peak_bytes"] is None else f"peak {row['peak_reserved_bytes'] / 1e9:.2f} GB, "
    return f"{peak}training step {row['training_step_ms']['p50']:.0f} ms, states {row['state_bytes'] / 1e9:.2f} GB"


def failures(done: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What ought to have worked: the tests, and ours offloaded."""
    failed = done[TESTS].get("failures", [done[TESTS].get("error", "")])
    return [*failed, *(f"{row['arm']}: {outcome(row)}" for row in rows if row["limited"] and not ran(row))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_offload", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", choices=ARCHITECTURES, default="Llama-3-8B")
    parser.add_argument(
        "--card", type=float, default=24.0, metavar="GB", help="what ours offloaded may take of the device"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=results.RESULTS)
    add_arguments(parser, smoke="a tiny model")
    add_process_arguments(parser, [arm.slug for arm in ARMS])
    args = parser.parse_args(argv)
    device = device_of(parser, args, "gpu-offload")
    if device is None:
        return 2
    n_tokens = SMOKE_TOKENS if args.smoke else TOKENS
    if args.one is not None:
        arm = next(arm for arm in ARMS if arm.slug == args.one)
        config = TINY if args.smoke else ARCHITECTURES[args.model]
        leave_row(args, lambda: train(arm, config, device, n_tokens, args.card))
        return 0

    shared = results.provenance() | {
        "schema": SCHEMA,
        "model": "tiny" if args.smoke else args.model,
        "card_gb": args.card,
        "device": device.facts(),
        "kernel_hash": kernel_hash(),
        "tokens": n_tokens,
        "smoke": args.smoke,
    }
    shared["versions"] |= versions()
    stem = (
        f"offload-{slug(shared['model'])}-{args.card:g}gb-{slug(shared['device']['name'])}-{shared['commit']}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / f"{stem}-{shared['kernel_hash']}.state.tmp"
    kept = Kept(state)
    slices = [Slice(TESTS, TEST_SECONDS, lambda seconds: tests(device, args.smoke, seconds))]
    slices += [Slice(arm.slug, SECONDS, lambda s, arm=arm: in_subprocess(arm, args, s)) for arm in ARMS]
    left = run_slices(slices, kept, args.time_limit, outcome)
    if left:
        print(f"incomplete: {left} of {len(slices)} slices are left; the same command continues")
        return 0
    rows = [
        {
            "arm": arm.name,
            "limited": arm.limited,
            "isolates": arm.isolates,
            "note": arm.note,
            **kept.done[arm.slug],
        }
        for arm in ARMS
    ]
    text = json.dumps({**shared, "tests": kept.done[TESTS], "rows": rows}, indent=1) + "\n"
    path = results.write_new(args.out, f"{stem}-{shared['date'][:10]}", text)
    state.unlink(missing_ok=True)
    print(f"written: {path}")
    failed = failures(kept.done, rows)
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
