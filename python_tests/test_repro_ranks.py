"""`epi-kernels reproduce` on several ranks, real processes over gloo: one process's runs, by any number of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  once, before the ranks are forked
from safetensors.torch import load_file

import epi_kernels.repro.methods.lora  # noqa: F401
from epi_kernels.finetune.ranks import Ranks
from epi_kernels.optim import exchange
from epi_kernels.reference import bits
from epi_kernels.repro.characters import make_tokenizer
from epi_kernels.repro.evaluate import evaluate
from epi_kernels.repro.execute import ensure, execute
from epi_kernels.repro.methods import config as configs
from epi_kernels.repro.runs import Train, ancestry, key
from epi_kernels.repro.store import ISOLATION, Store
from epi_kernels.repro.sweep import Plan, sweep
from epi_kernels.repro.train import Limits, Stopped
from epi_kernels.repro.workshop import Workshop
from python_tests.ranks import on_ranks, outcomes
from python_tests.repro_runs import RECIPE, STRINGS, SUMS, cpift, first, halfway, manifests, second
from python_tests.test_repro_evaluate import Planted, make_model, raw

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
UNEVEN = RECIPE.model_copy(update={"batch": 7})  # 2 ranks have 4 and 3 rows of a step
MANY = RECIPE.model_copy(update={"batch": 9, "accumulation": 3})  # one process has 3 micro-batches, ranks 2


def mixture(method) -> Train:
    return Train(
        before=first(), tasks=(SUMS, STRINGS), evaluate=(SUMS,), recipe=MANY, method=method, seed=1,
        observe=("conflict:every=2",),
    )  # fmt: skip


EPI = second(recipe=UNEVEN, observe=("stability:window=1",))
# of methods whose weights may lie over the ranks; the interpolations keep weights, importance and masks
CARRIED = second(recipe=UNEVEN)
PLAIN = second(configs.Full(), recipe=MANY)
SHARDED = [
    halfway(CARRIED),
    halfway(PLAIN),
    second(configs.Epi(ratio=0.1, interval=2, core=0.1, state_dtype="int8"), recipe=UNEVEN),
    second(configs.Static(ratio=0.2)),
    second(configs.Static(ratio=0.2, by="delta")),
    second(configs.RandomMask(ratio=0.2, interval=2)),
    second(configs.Replay(share=0.3), recipe=MANY),
    cpift(tau=0.0),
]
LEAVES = [
    *SHARDED,
    halfway(EPI),
    mixture(configs.PcGrad()),
    second(configs.PcGrad(share=0.3), recipe=MANY),
    second(configs.Ewc(strength=1.0), recipe=MANY),
    second(configs.Lora(rank=2), recipe=UNEVEN),
]


def make(rank: int, n_ranks: int, folder: Path, leaves: list, fsdp: bool = False) -> int:
    """Runs that a sweep made."""
    ranks = Ranks(rank, n_ranks, rank)
    return sweep(Plan.of(leaves), Store(folder), device=CPU, workers=1, ranks=ranks, fsdp=fsdp).finished


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, with one thread as the ranks have."""
    folder = tmp_path_factory.mktemp("alone")
    on_ranks(1, make, 1, folder, LEAVES)
    return folder


def assert_one_process(folder: Path, alone: Path) -> None:
    """Gradients were added in another order: nearly the same numbers, and the same files."""
    mine = manifests(folder)
    theirs = {name: one for name, one in manifests(alone).items() if name in mine}
    for name in mine:
        files = [sorted(path.name for path in (one / name).iterdir()) for one in (folder, alone)]
        assert files[0] == files[1]
    assert {path.name for path in folder.iterdir()} == {*mine, "lock"}
    for name, wanted in theirs.items():
        assert mine[name]["scores"] == pytest.approx(wanted["scores"])
        assert mine[name]["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
        assert mine[name]["notes"] == wanted["notes"]
        assert_close(mine[name]["series"], wanted["series"])
        if wanted["bytes"] is not None:
            both = mine[name]["bytes"]["optimizer"], wanted["bytes"]["optimizer"]
            if mine[name]["machine"].get("fsdp"):  # every part has its own count of steps and ends of blocks
                both = both[0]["total"], pytest.approx(both[1]["total"], rel=0.02)
            assert both[0] == both[1]


def assert_close(mine, theirs) -> None:
    """Plain JSON, numbers within rounding."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert_close(mine[name], theirs[name])
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs)
        for pair in zip(mine, theirs):
            assert_close(*pair)
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    else:
        assert mine == theirs


def test_ranks_make_the_runs_of_one_process(alone, tmp_path):
    counts = on_ranks(2, make, 2, tmp_path, LEAVES)
    plan = Plan.of(LEAVES)
    assert counts == [len(plan.runs)] * 2 and set(plan.runs) < manifests(alone).keys()  # CPI-FT's own too
    assert manifests(tmp_path).keys() == manifests(alone).keys()
    assert_one_process(tmp_path, alone)
    assert {one["machine"].get("ranks") for one in manifests(tmp_path).values()} == {2}
    assert {one["machine"].get("ranks") for one in manifests(alone).values()} == {None}
    assert_same_masks(tmp_path, alone, key(EPI))
    assert on_ranks(2, make, 2, tmp_path, LEAVES) == [0, 0]


def test_sharded_stages_have_the_numbers_and_masks_of_one_process(alone, tmp_path):
    plan = Plan.of(SHARDED)
    assert on_ranks(2, make, 2, tmp_path, SHARDED, True) == [len(plan.runs)] * 2
    assert set(plan.runs) < manifests(tmp_path).keys()
    assert_one_process(tmp_path, alone)
    assert all(one["machine"]["fsdp"] for one in manifests(tmp_path).values())
    assert_same_masks(tmp_path, alone, key(CARRIED))


def test_what_cannot_be_sharded_is_refused_by_name_before_anything_starts(tmp_path):
    for leaf, said in ((second(configs.Lora()), "lora cannot train"), (EPI, "what stability measures")):
        both = outcomes(2, make, 2, tmp_path, [leaf], True)
        assert all(one.kind == "UserError" and said in one.message for one in both[1:])
        assert said in both[0].message and manifests(tmp_path) == {}


def assert_same_masks(folder: Path, alone: Path, name: str) -> None:
    weights = [load_file(one / name / "model.safetensors") for one in (folder, alone)]
    for tensor, value in weights[1].items():
        torch.testing.assert_close(weights[0][tensor], value, rtol=1e-4, atol=1e-5)
    saved = [exchange.read(one / name / ISOLATION).parameters for one in (folder, alone)]
    differing = isolated = elements = 0
    for tensor, wanted in saved[1].items():
        masks = [one[tensor].masks["isolation_mask"] for one in saved]
        mask, other = (bits.unpack(one, 8 * one.numel()) for one in masks)
        differing, isolated = differing + int((mask != other).sum()), isolated + int(other.sum())
        elements += wanted.shape.numel()
        torch.testing.assert_close(saved[0][tensor].importance, wanted.importance, rtol=1e-3, atol=1e-9)
    assert isolated > 500 and differing <= 1e-4 * elements


# ---------------------------------------------------------------- stopped, and gone on with


def stopped(rank: int, n_ranks: int, folder: Path, run: Train, fsdp: bool) -> bool:
    """The time is over on the last rank alone when three steps of the run are done."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done == 3 and rank == n_ranks - 1:
            limits.deadline = time.time()

    limits = Limits(tick=tick)
    keep = frozenset(map(key, ancestry(halfway(run))))
    shop = Workshop(Store(folder), CPU, Limits(), keep, Ranks(rank, n_ranks), fsdp)
    ensure(run.before, shop)
    with pytest.raises(Stopped):
        execute(run, replace(shop, limits=limits))
    return done == 3


@pytest.mark.parametrize(
    ("run", "before", "after"),
    [(EPI, (2, False), (1, False)), (CARRIED, (1, False), (3, False)), (CARRIED, (2, True), (3, False)),
     (PLAIN, (1, False), (2, True))],
    ids=["2-1", "1-3", "2-fsdp-3", "adamw-1-2-fsdp"],
)  # fmt: skip
def test_a_stopped_run_goes_on_with_any_number_of_ranks(alone, tmp_path, run, before, after):
    (n, how), (m, then) = before, after
    assert on_ranks(n, stopped, n, tmp_path, run, how) == [True] * n
    saved = torch.load(Store(tmp_path).progress(run), weights_only=True)
    assert saved["step"] == 3 and Store(tmp_path).manifest(run) is None
    on_ranks(m, make, m, tmp_path, [halfway(run)], then)
    assert_one_process(tmp_path, alone)
    if run is not PLAIN:
        assert_same_masks(tmp_path, alone, key(run))


# ---------------------------------------------------------------- evaluation


class Recording(Planted):
    """Says what it was given to score, and how often."""

    def __init__(self, examples):
        super().__init__(examples, exact=False)
        self.calls = []

    def score(self, answers, examples):
        self.calls.append(list(answers))
        return super().score(answers, examples)


def evaluated(rank: int, n_ranks: int, count: int) -> tuple:
    examples = [raw("abcdefg"[: 1 + at % 7], "abc"[: 1 + at % 3]) for at in range(count)]
    task = Recording(examples)
    found = evaluate(
        make_model().eval(), make_tokenizer(), task, examples, CPU, 4, ranks=Ranks(rank, n_ranks)
    )
    return found, task.calls


@pytest.mark.parametrize("count", [1, 11])
def test_answers_are_gathered_in_order_and_scored_once(count):
    (((score, loss), (answers,)),) = on_ranks(1, evaluated, 1, count)
    one, other = on_ranks(2, evaluated, 2, count)
    assert one == ((score, pytest.approx(loss, rel=1e-5)), [answers]) and len(answers) == count
    assert count == 1 or len(set(answers)) > 1
    assert other[0] == one[0] and other[1] == []
