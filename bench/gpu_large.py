"""make gpu-large: real training steps of a 7-to-9-billion-parameter model with each optimizer, on one GPU.

The model is built from its config with random weights; nothing is downloaded. Every optimizer trains in a process of
its own, so that one that runs out of memory costs its row and no other's; the row says so. What is done is kept
beside the results, and the same command continues. A process that hangs is stopped within the time limit (at least
150 s a process), and one that twice ended with everything around it, or in no time, is recorded as that.

    python -m bench.gpu_large --time-limit 540            as many optimizers as fit in the time
    python -m bench.gpu_large --model Mistral-7B
    python -m bench.gpu_large --device cpu --smoke        a tiny model: tests this program, times nothing

Exit status: 0 done or stopped in time; 1 an optimizer of ours failed, which one that runs out of memory does not; 2 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.contenders import BF16, CONTENDERS, Contender
from bench.gpu_device import Device, add_arguments, device_of, versions
from bench.gpu_record import slug
from bench.gpu_timing import release
from bench.side_by_side import peak_bytes, stored_bytes
from bench.slices import Kept, Slice, run_slices
from bench.sources import kernel_hash
from epi_kernels import published
from epi_kernels.architectures import ARCHITECTURES
from epi_kernels.files import write_whole

SCHEMA = 1
STEPS, WARM_UP = 5, 2
TOKENS, SMOKE_TOKENS = 512, 8  # a batch of one sequence: the optimizer is what is measured
SECONDS = 150  # of one optimizer, guessed: what --time-limit leaves must hold the next one
OUT_OF_MEMORY = "out of memory"  # how the reason of such a row begins
GRACE = 5.0  # seconds after which a process ends itself that its parent did not stop: the parent is gone
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
        return {"parameters": made, "skipped": out_of_memory(contender, made, error)}
    except Exception as error:  # a peer may fail in any way; the row says how
        return {"parameters": made, "skipped": f"{type(error).__name__}: {error}"[:200]}


def out_of_memory(contender: Contender, parameters: int, error: Exception) -> str:
    """EPI as published is expected to: its row says what it would have needed."""
    said = str(error).splitlines()[0][:150]
    if not contender.name.startswith("EPI as published") or not parameters:
        return f"{OUT_OF_MEMORY}: {said}"
    each = 2 * BF16.itemsize + published.STATE_TOTAL_BYTES + published.REFRESH_BYTES
    need = f"weights, gradients, state and a refresh are {parameters * each / 1e9:.4g} GB"
    return f"{OUT_OF_MEMORY}, as expected ({need}): {said}"


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

    whole_step()  # the states are there now
    refresh: Callable[[], Any] | None = None
    if contender.refresh is not None:
        refresh = getattr(optimizer, contender.refresh)
    found: dict[str, Any] = {}
    if refresh is not None:
        try:
            refresh()  # from here on a hundredth is isolated
        except torch.OutOfMemoryError as error:  # the steps are figures all the same, without a mask
            found["refresh_skipped"], refresh = out_of_memory(contender, elements, error), None
        release()
    for _ in range(WARM_UP - 1):
        whole_step()
    peak = peak_bytes(device, whole_step)
    step_ms = []
    for _ in range(STEPS):
        backward()
        step_ms += device.time_round([optimizer.step])
        optimizer.zero_grad(set_to_none=True)
    held = elements * BF16.itemsize + stored_bytes(optimizer.state)  # weights and state, between steps
    found |= {
        "step_ms": results.percentiles(step_ms),
        "state_bytes_per_parameter": stored_bytes(optimizer.state) / elements,
        "peak_bytes": None if peak is None else held + peak,
        "losses": losses,
    }
    if refresh is not None:
        found["refresh_peak_bytes"] = peak_bytes(device, refresh)
        found["refresh_ms"] = results.percentiles([device.time_round([refresh])[0] for _ in range(2)])
    return found


# ---------------------------------------------------------------- the run


def in_subprocess(
    contender: Contender, model: str, device: str, smoke: bool, seconds: float
) -> dict[str, Any]:
    """The row of one optimizer. Raises subprocess.TimeoutExpired after ``seconds``."""
    arguments = ["--one", contender.slug, "--model", model, "--device", device]
    return row_of("bench.gpu_large", [*arguments, *(["--smoke"] if smoke else [])], seconds)


def row_of(
    module: str, arguments: list[str], seconds: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """What ``python -m module`` leaves of one arm of a run. Raises subprocess.TimeoutExpired after ``seconds``."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"  # not stdout, where libraries print
        command = [sys.executable, "-m", module, *arguments]
        command += ["--result", str(result), "--seconds", str(seconds)]
        done = subprocess.run(
            command, cwd=results.ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        if result.exists():
            return json.loads(result.read_text())
    return {"skipped": f"{how_ended(done.returncode)}: {done.stderr[-500:].strip() or 'it said nothing'}"}


def add_process_arguments(parser: argparse.ArgumentParser, slugs: list[str]) -> None:
    """Of the process of one arm: which, where its row goes, and what time it has."""
    parser.add_argument("--one", choices=slugs, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=argparse.SUPPRESS)


def leave_row(args: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> None:
    """What that process does."""
    faulthandler.dump_traceback_later(args.seconds + GRACE, exit=True)
    write_whole(args.result, json.dumps(measure()))


def how_ended(status: int) -> str:
    """Of a process that left no result."""
    if status >= 0:
        return f"exited {status} without a result"
    name = str(-status)
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    likely = " (the host's memory, most likely)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{likely}"


def ran(row: dict[str, Any]) -> bool:
    return "skipped" not in row and "error" not in row


def outcome(row: dict[str, Any]) -> str:
    if not ran(row):
        return row.get("skipped") or row["error"]
    peak = "" if row["peak_bytes"] is None else f"peak {row['peak_bytes'] / 1e9:.1f} GB, "
    refresh = f", refresh {row['refresh_ms']['p50']:.1f} ms" if "refresh_ms" in row else ""
    refresh += f", refresh {row['refresh_skipped']}" if "refresh_skipped" in row else ""
    return f"{peak}step {row['step_ms']['p50']:.1f} ms, {row['state_bytes_per_parameter']:.3f} B a parameter{refresh}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_large", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", choices=ARCHITECTURES, default="Llama-3-8B")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=results.RESULTS)
    add_arguments(parser, smoke="a tiny model")
    add_process_arguments(parser, [one.slug for one in ENTERED])
    args = parser.parse_args(argv)
    device = device_of(parser, args, "gpu-large")
    if device is None:
        return 2
    if args.one is not None:
        contender = next(contender for contender in ENTERED if contender.slug == args.one)
        config, n_tokens = (TINY, SMOKE_TOKENS) if args.smoke else (ARCHITECTURES[args.model], TOKENS)
        leave_row(args, lambda: train(contender, config, device, n_tokens))
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
    kept = Kept(state)
    slices = [
        Slice(c.slug, SECONDS, lambda s, c=c: in_subprocess(c, args.model, args.device, args.smoke, s))
        for c in ENTERED
    ]
    left = run_slices(slices, kept, args.time_limit, outcome)
    if left:
        print(f"incomplete: {left} of {len(slices)} optimizers are left; the same command continues")
        return 0
    rows = [
        {"contender": c.name, "isolates": c.isolates, "note": c.note, **kept.done[c.slug]} for c in ENTERED
    ]
    text = json.dumps({**shared, "rows": rows}, indent=1) + "\n"
    path = results.write_new(args.out, f"{stem}-{shared['date'][:10]}", text)
    state.unlink(missing_ok=True)
    print(f"written: {path}")
    failed = [row for row in rows if row["contender"].startswith("ours") and not ran(row)]
    return 1 if any(not outcome(row).startswith(OUT_OF_MEMORY) for row in failed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
