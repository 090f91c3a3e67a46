"""make gpu-large: real training steps of a 7-to-9-billion-parameter model with each optimizer, on one GPU.

The model is built from its config with random weights; nothing is downloaded. Every optimizer trains in a process of
its own, so that one that runs out of memory costs its row and no other's; the row says so. What is done is kept
beside the results, and the same command continues.

    python -m bench.gpu_large --time-limit 540            as many optimizers as fit in the time
    python -m bench.gpu_large --model Mistral-7B
    python -m bench.gpu_large --device cpu --smoke        a tiny model: tests this program, times nothing

Exit status: 0 done or stopped in time; 1 an optimizer of ours failed; 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.contenders import BF16, CONTENDERS, Contender
from bench.gpu import Slice, keep, run_slices
from bench.gpu_device import Device, add_arguments, device_of, versions
from bench.gpu_record import slug
from bench.side_by_side import peak_bytes, stored_bytes
from bench.status import kernel_hash
from epi_kernels.architectures import ARCHITECTURES

SCHEMA = 1
STEPS, WARM_UP = 5, 2
TOKENS, SMOKE_TOKENS = 512, 8  # a batch of one sequence: the optimizer is what is measured
SECONDS = 150  # of one optimizer, guessed: what --time-limit leaves must hold the next one
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENTERED = [contender for contender in CONTENDERS if contender.weights == BF16 and not contender.cpu_only]


# ---------------------------------------------------------------- one optimizer, in its own process


def train(contender: Contender, config: dict[str, Any], device: Device, n_tokens: int) -> dict[str, Any]:
    """Figures of some training steps in bfloat16; ``skipped`` where memory runs out or the peer cannot run."""
    made = 0
    try:
        model = build(config, device)
        made = sum(param.numel() for param in model.parameters())
        return {"parameters": made, **_steps(contender, model, device, config["vocab_size"], n_tokens)}
    except torch.OutOfMemoryError as error:
        return {"parameters": made, "skipped": f"out of memory: {str(error).splitlines()[0]}"[:200]}
    except Exception as error:  # a peer may fail in any way; the row says how
        return {"parameters": made, "skipped": f"{type(error).__name__}: {error}"[:200]}


def build(config: dict[str, Any], device: Device) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device.torch_device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=BF16)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    return model.train()


def _steps(
    contender: Contender, model: torch.nn.Module, device: Device, vocabulary: int, n_tokens: int
) -> dict[str, Any]:
    generator = torch.Generator(device.torch_device).manual_seed(0)
    tokens = torch.randint(vocabulary, (1, n_tokens), generator=generator, device=device.torch_device)
    params = list(model.parameters())
    elements = sum(param.numel() for param in params)
    optimizer = contender.make(params)
    losses: list[float] = []

    def backward() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())

    def whole_step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM_UP):
        whole_step()
    peak = peak_bytes(device, whole_step)
    step_ms = []
    for _ in range(STEPS):
        backward()
        step_ms += device.time_round([optimizer.step])
        optimizer.zero_grad(set_to_none=True)
    held = elements * BF16.itemsize + stored_bytes(optimizer.state)  # weights and state, between steps
    found: dict[str, Any] = {
        "step_ms": results.percentiles(step_ms),
        "state_bytes_per_parameter": stored_bytes(optimizer.state) / elements,
        "peak_bytes": None if peak is None else held + peak,
        "losses": losses,
    }
    if contender.refresh is not None:
        refresh: Callable[[], Any] = getattr(optimizer, contender.refresh)
        found["refresh_peak_bytes"] = peak_bytes(device, refresh)
        found["refresh_ms"] = results.percentiles([device.time_round([refresh])[0] for _ in range(2)])
    return found


# ---------------------------------------------------------------- the run


def in_subprocess(contender: Contender, model: str, device: str, smoke: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gpu_large", "--one", contender.slug, "--model", model]
    command += ["--device", device, *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"skipped": f"exited {done.returncode}: {done.stderr[-500:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def ran(row: dict[str, Any]) -> bool:
    return "skipped" not in row and "error" not in row


def outcome(row: dict[str, Any]) -> str:
    if not ran(row):
        return row.get("skipped") or row["error"]
    peak = "" if row["peak_bytes"] is None else f"peak {row['peak_bytes'] / 1e9:.1f} GB, "
    refresh = f", refresh {row['refresh_ms']['p50']:.1f} ms" if "refresh_ms" in row else ""
    return f"{peak}step {row['step_ms']['p50']:.1f} ms, {row['state_bytes_per_parameter']:.3f} B a parameter{refresh}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_large", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", choices=ARCHITECTURES, default="Llama-3-8B")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=results.RESULTS)
    add_arguments(parser, smoke="a tiny model")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one optimizer
    args = parser.parse_args(argv)
    device = device_of(parser, args, "gpu-large")
    if device is None:
        return 2
    if args.one is not None:
        contender = next(contender for contender in ENTERED if contender.slug == args.one)
        config, n_tokens = (TINY, SMOKE_TOKENS) if args.smoke else (ARCHITECTURES[args.model], TOKENS)
        print(json.dumps(train(contender, config, device, n_tokens)))
        return 0

    shared = results.provenance() | {
        "schema": SCHEMA,
        "model": "tiny" if args.smoke else args.model,
        "device": device.facts(),
        "kernel_hash": kernel_hash(),
        "tokens": SMOKE_TOKENS if args.smoke else TOKENS,
        "smoke": args.smoke,
    }
    shared["versions"] |= versions()
    stem = f"large-{slug(shared['model'])}-{slug(shared['device']['name'])}-{shared['commit']}"
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / f"{stem}-{shared['kernel_hash']}.state.tmp"
    done: dict[str, Any] = {}
    save = keep(done, state)
    slices = [
        Slice(c.slug, SECONDS, lambda c=c: in_subprocess(c, args.model, args.device, args.smoke))
        for c in ENTERED
    ]
    left = run_slices(slices, done, save, args.time_limit, outcome)
    if left:
        print(f"incomplete: {left} of {len(slices)} optimizers are left; the same command continues")
        return 0
    rows = [{"contender": c.name, "isolates": c.isolates, "note": c.note, **done[c.slug]} for c in ENTERED]
    text = json.dumps({**shared, "rows": rows}, indent=1) + "\n"
    path = results.write_new(args.out, f"{stem}-{shared['date'][:10]}", text)
    state.unlink(missing_ok=True)
    print(f"written: {path}")
    failed = [row["contender"] for row in rows if not ran(row) and row["contender"].startswith("ours")]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
