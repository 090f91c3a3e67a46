"""make quality: what low-precision weights and states cost a training run, in held-out loss and in the mask.

    python -m bench.quality            everything, ten to twenty minutes on two cores; writes one result file
    python -m bench.quality --quick    a smoke run: a few steps of one seed, nothing written

A small Llama with random weights learns the demo's sums and string instructions together, with isolation
on. Every configuration of a seed starts from the same weights, rounded where they are bfloat16, and sees
the same batches. The model computes in its weights' dtype, the loss in float32.

Training is chaotic: a mask would differ from float32's whatever made the runs part. So two float32 runs a
seed start elsewhere, one with a single weight moved by 1e-6 of itself, one with all of them rounded to bfloat16
once; what their masks differ is chaos, not precision.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench import quality_record, results
from epi_kernels import MaskedEMAAdamW
from epi_kernels.demo.protocol import backend_name
from epi_kernels.demo.tasks import IGNORED, Examples, joined, make_tasks
from epi_kernels.demo.train import make_model, schedule
from epi_kernels.integrations import named_parameter_groups
from epi_kernels.training import state_bytes
from epi_kernels.workers import processes, usable_cores

NUDGE = 1e-6  # relative, some 8 units in the last place of a float32


@dataclass(frozen=True)
class Configuration:
    """Dtypes of weights and states, and what is done to the weights before the first step.

    ``nudged`` moves one of them by NUDGE, ``rounded`` makes them all values that bfloat16 can hold.
    """

    name: str
    weights: torch.dtype
    states: torch.dtype | str
    master_weight_bits: int = 16
    nudged: bool = False
    rounded: bool = False


CONFIGURATIONS = (
    Configuration(quality_record.BASE, torch.float32, torch.float32),
    Configuration("float32, one weight moved by 1e-6", torch.float32, torch.float32, nudged=True),
    Configuration("float32, weights rounded once", torch.float32, torch.float32, rounded=True),
    Configuration("bfloat16", torch.bfloat16, torch.bfloat16),
    Configuration("bfloat16, float32 states", torch.bfloat16, torch.float32),
    Configuration("bfloat16, 8-bit states", torch.bfloat16, "int8"),
    Configuration("bfloat16 with 24 bits, 8-bit states", torch.bfloat16, "int8", master_weight_bits=24),
    Configuration("float32, 8-bit states", torch.float32, "int8"),
    Configuration("bfloat16, 4-bit states", torch.bfloat16, "int4"),
    Configuration("float32, 4-bit states", torch.float32, "int4"),
)


@dataclass(frozen=True)
class Plan:
    """What is run. The model is the demo's: matrices of 4,096 elements and more, norms of 64."""

    steps: int = 1000
    interval: int = 100  # mask_interval; the last refresh is after the last step
    seeds: tuple[int, ...] = (1, 2, 3)
    ratios: tuple[float, ...] = (0.01, 0.1)
    batch: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    hidden: int = 64
    layers: int = 2
    learn: int = 4000  # prompts a task
    held_out: int = 500  # prompts a task

    def quick(self) -> Plan:
        return replace(self, steps=4, interval=2, seeds=(1,), learn=64, held_out=16)

    def jobs(self) -> list[tuple[float, Configuration, int]]:
        return [(p, one, seed) for p in self.ratios for one in CONFIGURATIONS for seed in self.seeds]


# ---------------------------------------------------------------- one run


def _loss(model: Any, examples: Examples, rows: Tensor | slice) -> Tensor:
    """Mean over the answers' characters, in nats."""
    logits = model(input_ids=examples.ids[rows]).logits.float()  # [rows, LENGTH, alphabet]
    return F.cross_entropy(logits.flatten(0, 1), examples.labels[rows].flatten(), ignore_index=IGNORED)


def _model(plan: Plan, configuration: Configuration, seed: int) -> Any:
    model = make_model(seed, plan.hidden, plan.layers)
    with torch.no_grad():
        if configuration.nudged:
            model.model.layers[0].self_attn.q_proj.weight[0, 0] *= 1 + NUDGE
        for param in model.parameters():  # not model.to(): rotary frequencies stay float32
            if configuration.rounded:
                param.data = param.data.bfloat16()
            param.data = param.data.to(configuration.weights)
    return model


def train_once(plan: Plan, ratio: float, configuration: Configuration, seed: int) -> dict[str, Any]:
    """One training run: its figures, and ``mask`` [n_parameters] bool, the isolation mask after the last step."""
    started = time.perf_counter()
    tasks = make_tasks(seed, plan.learn, known=0, test=plan.held_out)
    examples, held_out = joined(tasks.learn_a, tasks.learn_b), joined(tasks.test_a, tasks.test_b)
    model = _model(plan, configuration, seed)
    parameters = list(model.parameters())
    optimizer = MaskedEMAAdamW(
        named_parameter_groups(model, weight_decay=plan.weight_decay),
        lr=plan.lr,
        isolation_ratio=ratio,
        mask_interval=plan.interval,
        state_dtype=configuration.states,
        master_weight_bits=configuration.master_weight_bits,
        seed=seed,
    )
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(plan.steps):
        if len(order) < plan.batch:
            order = torch.randperm(len(examples), generator=rng)
        rows, order = order[: plan.batch], order[plan.batch :]
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * schedule(step, plan.steps)
        optimizer.zero_grad()
        _loss(model, examples, rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        loss = _loss(model, held_out, slice(None)).item()
    mask = torch.cat([optimizer.isolation_mask(param).flatten() for param in parameters]).numpy()
    return {
        "ratio": ratio,
        "configuration": configuration.name,
        "seed": seed,
        "held_out_loss": loss,
        "isolated": int(np.count_nonzero(mask)),
        "parameters": mask.size,
        "state_bytes": state_bytes(optimizer)["total"],
        "backend": backend_name(model),
        "seconds": round(time.perf_counter() - started, 1),
        "mask": mask,
    }


# ---------------------------------------------------------------- all runs


def train_all(plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Every run of the plan, in its order, on processes of one thread each; masks become ``jaccard``."""
    with processes(workers) as (pool, _):
        futures: list[Future] = [pool.submit(train_once, plan, *job) for job in plan.jobs()]
        for done in tqdm(as_completed(futures), total=len(futures), desc="training", unit="run"):
            done.result()  # raises at once where a run failed
    return with_jaccard([future.result() for future in futures])


def with_jaccard(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``mask`` replaced by ``jaccard``, with the float32 run's mask of the same ratio and seed; None for float32."""
    base = {
        (run["ratio"], run["seed"]): run["mask"]
        for run in runs
        if run["configuration"] == quality_record.BASE
    }
    found = []
    for run in runs:
        figures = {key: value for key, value in run.items() if key != "mask"}
        beside = base[run["ratio"], run["seed"]]
        own = run["configuration"] == quality_record.BASE
        found.append(figures | {"jaccard": None if own else quality_record.jaccard(run["mask"], beside)})
    return found


def measure(plan: Plan, workers: int) -> dict[str, Any]:
    """The record of quality_record.py."""
    identity = results.provenance()
    identity["versions"]["transformers"] = metadata.version("transformers")
    load, started = os.getloadavg()[0], time.perf_counter()
    runs = train_all(plan, workers)
    return {
        **identity,
        "load_before": round(load, 2),
        "settings": asdict(plan),
        "parameters": runs[0]["parameters"],
        "workers": workers,
        "wall_s": round(time.perf_counter() - started, 1),
        "runs": runs,
        "rows": quality_record.summarize(runs),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed; nothing is written")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes of one thread each (the cores, at most 8)"
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config and no weights: nothing is asked of the hub

    record = measure(Plan().quick() if args.quick else Plan(), args.workers or min(8, usable_cores()))
    print(quality_record.rows_table(record["rows"]))
    if args.quick:
        print("not written: a smoke run, its figures say nothing")
    else:
        print(f"written: {quality_record.write_new(record, args.out)} ({record['wall_s']:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
