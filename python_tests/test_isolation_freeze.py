"""Consolidated training: frozen cores keep their bits, in both readings, from Python and through `finetune --freeze`."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from epi_kernels import MaskedEMAAdamW, cli
from epi_kernels.finetune import checkpoint, frozen
from epi_kernels.finetune import command as finetune
from epi_kernels.isolation import (
    IsolationError,
    MemoryCore,
    consolidate,
    find_core,
    freeze,
    plan_stages,
    save_core,
)
from epi_kernels.isolation.core_file import CoreFile, union_mask
from python_tests.finetune_runs import arguments, events, weights, write_inputs
from python_tests.harness import Target, give_gradients, make, small_model, train
from python_tests.rank_runs import Patch, started
from python_tests.ranks import on_ranks
from python_tests.sharded import cut, gradient
from python_tests.sharded import weights as weights_of
from python_tests.stopped_runs import signalled
from python_tests.tiny_model import command, save_tiny


def cores_of(params, tasks: int, density: float = 0.3) -> list[MemoryCore]:
    rng = torch.Generator().manual_seed(5)
    return [
        MemoryCore.from_bools(
            {name: torch.rand(p.shape, generator=rng) < density for name, p in params.items()}
        )
        for _ in range(tasks)
    ]


CASES = [
    ("earlier", torch.bfloat16),
    ("earlier", torch.float32),
    ("all", torch.float32),
    ("all", torch.bfloat16),
    ("single", torch.bfloat16),
]


def test_frozen_cores_keep_their_bits(target: Target):
    """Weight decay, momentum and (bfloat16) stochastic rounding at work; an evolving mask beside the frozen cores."""
    for reading, dtype in CASES[:1] if target.interpreted else CASES:
        consolidated_run(target, reading, dtype)


def consolidated_run(target: Target, reading: str, dtype: torch.dtype) -> None:
    params = {
        name: torch.nn.Parameter(p.detach().to(target.device, dtype)) for name, p in small_model().items()
    }
    cores = cores_of(params, 3)
    groups = [[1], [0, 2]]
    stages = plan_stages(groups, "all" if reading == "single" else reading, single_stage=reading == "single")
    seen = []

    def make_optimizer(stage) -> MaskedEMAAdamW:
        return make(
            params,
            backend=target.backend,
            weight_decay=0.5,
            isolation_ratio=0.1,
            mask_interval=2,
            seed=len(seen),
        )

    def train_stage(stage, optimizer) -> None:
        before = {name: p.detach().clone() for name, p in params.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of refreshes that isolate nothing
            train(optimizer, params, 2 if target.interpreted else 5)
        for name, p in params.items():
            frozen = torch.zeros(p.shape, dtype=torch.bool)
            for task in stage.frozen:
                frozen |= union_mask([cores[task]], name)
            frozen = frozen.to(p.device)
            assert torch.equal(p[frozen], before[name][frozen]), name
            if p.numel() > 8:
                assert not torch.equal(p[~frozen], before[name][~frozen]), name
                moved = (p != before[name])[~frozen].double().mean()
                assert moved > 0.5, name  # the rest is trained: a tenth isolated, some rounding back
            assert torch.equal(optimizer.isolation_mask(p) & frozen, frozen)
        seen.append(stage)

    consolidate(stages, cores, make_optimizer, train_stage)
    assert seen == stages
    expected = {"earlier": [(), (1,)], "all": [(1, 0, 2)] * 2, "single": [(1, 0, 2)]}
    assert [stage.frozen for stage in seen] == expected[reading]


def test_freeze_replaces_and_lifts():
    params = small_model()
    first, second = cores_of(params, 2)
    optimizer = make(params, isolation_ratio=0)
    assert freeze(optimizer, []) == 0 and len(optimizer.state) == 0
    held = {name: union_mask([first], name) for name in params}
    assert freeze(optimizer, [first]) == sum(int(mask.sum()) for mask in held.values())
    both = {name: union_mask([first, second], name) for name in params}
    assert freeze(optimizer, [first, second]) == sum(int(mask.sum()) for mask in both.values())
    assert all(torch.equal(optimizer.isolation_mask(p), both[name]) for name, p in params.items())
    freeze(optimizer, [second])
    for name, p in params.items():
        assert torch.equal(optimizer.isolation_mask(p), union_mask([second], name))
    assert freeze(optimizer, []) == 0
    assert not any(optimizer.isolation_mask(p).any() for p in params.values())


def test_freeze_refuses_what_does_not_fit_and_changes_nothing():
    params = small_model()
    (core,) = cores_of(params, 1)
    optimizer = make(params)
    last = list(params)[-1]

    def refused(match, *cores, optimizer=optimizer, error=IsolationError):
        with pytest.raises(error, match=match):
            freeze(optimizer, cores)
        assert len(optimizer.state) == 0

    masks = {name: union_mask([core], name) for name in params}
    fewer = MemoryCore.from_bools({name: mask for name, mask in masks.items() if name != last})
    refused(f"of another architecture than the model: {last} is missing", fewer)
    refused("of another architecture than", core, fewer)
    other = MemoryCore.from_bools(masks | {last: torch.zeros(3, 5, 7, dtype=torch.bool)}, "wider")
    refused(rf"wider: .* {last} is \[3, 5, 7\]", other)
    more = MemoryCore.from_bools(masks | {"more": torch.ones(3, dtype=torch.bool)})
    refused("more is not in the model", more)
    refused("by name", core, optimizer=make(small_model(), named=False))
    refused("got AdamW", core, optimizer=torch.optim.AdamW(params.values()), error=TypeError)
    # A buffer that no run moves is no fault, nor are parameters that are not trained, if that is said.
    buffered = MemoryCore.from_bools(masks | {"buffer": torch.zeros(3, dtype=torch.bool)})
    held = sum(int(mask.sum()) for mask in masks.values())
    assert freeze(optimizer, [buffered]) == held
    assert freeze(optimizer, [more], partial=True) == held
    with pytest.raises(IsolationError, match="tasks up to 2, there are 1 cores"):
        consolidate(plan_stages([[0], [2]]), [core], lambda stage: optimizer, lambda stage, optimizer: None)


def test_frozen_weights_stay_after_a_saved_state(tmp_path):
    params = small_model()
    (core,) = cores_of(params, 1)
    optimizer = make(params, isolation_ratio=0)
    freeze(optimizer, [core])
    train(optimizer, params, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = make(params, isolation_ratio=0)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    before = {name: p.detach().clone() for name, p in params.items()}
    give_gradients(params, 9)
    again.step()
    for name, p in params.items():
        mask = union_mask([core], name)
        assert torch.equal(p[mask], before[name][mask])


# --- finetune --freeze ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("files"))
    for seed in (7, 8):
        save_tiny(folder / f"task{seed}", seed=seed)
        save_core(folder / "model", folder / f"task{seed}", folder / f"core{seed}", 0.2)
    return folder


def frozen_of(files):
    cores = [CoreFile(files / f"core{seed}") for seed in (7, 8)]
    return {name: union_mask(cores, name) for name in cores[0].shapes}


FREEZE = [
    "--max-steps",
    5,
    "--checkpoint-every",
    2,
    "--weight-decay",
    0.3,
    "--isolation-ratio",
    0,
    "--mask-interval",
    2,
]


@pytest.mark.parametrize("more", [(), ("--dtype", "bf16"), ("--isolation-ratio", 0.1)], ids=str)
def test_finetune_freezes_and_resumes(files, tmp_path, capsys, more):
    flags = ["--freeze", files / "core7", files / "core8", *FREEZE, *more]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(finetune, *arguments(files, whole, *flags)) == 0
    frozen = frozen_of(files)
    count = sum(int(mask.sum()) for mask in frozen.values())
    assert f"frozen for good: {count} weights of 2 core regions" in capsys.readouterr().out
    (event,) = events(whole, "freeze")
    assert event["frozen"] == count and len(event["cores"]) == 2
    before, after = load_file(files / "model" / "model.safetensors"), weights(whole)
    for name, mask in frozen.items():
        original = before[name].to(after[name].dtype)
        assert torch.equal(after[name][mask], original[mask]), name
        assert not torch.equal(after[name], original), name

    # Stopped between two checkpoints, resumed from anywhere, with the core files gone: the masks are in the state.
    copies = [files / "core7", files / "core8"]
    moved = [path.rename(tmp_path / path.name) for path in copies]
    flags[1:3] = moved
    with signalled(2):
        assert command(finetune, *arguments(files, out, *flags)) == 130
    for path, home in zip(moved, copies):
        path.rename(home)
    assert command(finetune, "--out", out, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_stages_of_finetune_in_both_readings(files, tmp_path):
    """What `isolate groups` prints, stage by stage: each run begins where the one before ended."""
    cores, before, model = [files / "core7", files / "core8"], {}, "model"
    for stage in plan_stages([[1], [0]]):
        out = tmp_path / f"stage{len(before)}"
        flags = ["--freeze", *(cores[task] for task in stage.frozen)] if stage.frozen else []
        assert command(finetune, *arguments(files, out, *FREEZE, *flags, model=model)) == 0
        model = out
        before[stage] = weights(out)
    first, second = before.values()
    core = CoreFile(cores[1])
    for name in first:
        mask = union_mask([core], name)
        assert torch.equal(first[name][mask], second[name][mask])
        assert not torch.equal(first[name], second[name])


def test_protect_and_freeze_go_together(files, tmp_path):
    first, out = tmp_path / "first", tmp_path / "out"
    assert command(finetune, *arguments(files, first, "--max-steps", 3)) == 0
    flags = ["--protect", first, "--freeze", files / "core7", "--max-steps", 3, "--isolation-ratio", 0.1]
    assert command(finetune, *arguments(files, out, *flags, model=first)) == 0
    before, after, core = weights(first), weights(out), CoreFile(files / "core7")
    for name in before:
        mask = union_mask([core], name)
        assert torch.equal(before[name][mask], after[name][mask])
    assert cli.main(["report", str(out)]) == 0
    (event,) = events(out, "freeze")
    assert f"{event['frozen']:,} weights of core regions frozen" in (out / "report.html").read_text()
    unchanged = sum(int((before[name] == after[name]).sum()) for name in before)
    assert unchanged > sum(int(union_mask([core], name).sum()) for name in before)


def test_finetune_counts_the_masks_of_frozen_cores(files, tmp_path):
    flags = ["--freeze", files / "core7", *FREEZE]
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, *flags)) == 0
    (start,), (end,) = events(out, "start"), events(out, "end")
    # The plan counts a persistent mask for every parameter; one that is empty (of norms that did not move) is not kept.
    core = CoreFile(files / "core7")
    empty = sum(-(-mask.numel() // 8) for name in core.shapes if not (mask := union_mask([core], name)).any())
    assert start["memory"]["ours"] == end["state_bytes"]["total"] - end["state_bytes"]["other"] + empty
    assert end["state_bytes"]["persistent_mask"] > 0


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=str)
def test_finetune_refuses_cores_of_another_model(files, tmp_path, capsys, dry):
    save_tiny(tmp_path / "wider", hidden_size=64)
    save_core(tmp_path / "wider", save_tiny(tmp_path / "wider2", seed=3, hidden_size=64), tmp_path / "core")
    out = tmp_path / "out"
    for path, match in (
        (tmp_path / "core", "of another architecture than the model"),
        (files / "qa.jsonl", "not a whole safetensors file"),
        (tmp_path / "nowhere", "no such file"),
        (files / "model" / "model.safetensors", "not a core region"),
    ):
        assert command(finetune, *arguments(files, out, "--freeze", path, *dry)) == 2
        assert match in capsys.readouterr().err
        assert not out.exists()


def test_overwrite_spares_the_cores(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, "--max-steps", 1)) == 0
    inside = out / "core"
    inside.write_bytes((files / "core7").read_bytes())
    assert command(finetune, *arguments(files, out, "--freeze", inside, "--overwrite")) == 2
    assert "--overwrite would delete --freeze" in capsys.readouterr().err
    assert inside.exists()


def test_a_comparison_freezes_ours_alone(files, tmp_path):
    out = tmp_path / "out"
    flags = ["--freeze", files / "core7", *FREEZE, "--compare"]
    assert command(finetune, *arguments(files, out, *flags)) == 0
    before, plain = load_file(files / "model" / "model.safetensors"), weights(out / "adamw")
    core = CoreFile(files / "core7")
    moved = sum(int((before[n] != plain[n])[union_mask([core], n)].sum()) for n in before)
    assert moved > 0.5 * sum(int(union_mask([core], n).sum()) for n in before)
    assert checkpoint.list_checkpoints(out)


def test_a_core_found_in_memory_freezes_too():
    params = small_model()
    tuned = {name: p.detach() + torch.arange(p.numel()).view(p.shape) for name, p in params.items()}
    core = find_core(dict(params), tuned, 0.1)
    optimizer = make(params, isolation_ratio=0)
    total = sum(p.numel() for p in params.values())
    assert freeze(optimizer, [core]) >= int(0.1 * total)


def sharded_run(rank: int):
    from torch.distributed.tensor import Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    params = {
        name: torch.nn.Parameter(cut(one, mesh, [Shard(0)]))
        for name, one in weights_of(torch.bfloat16).items()
    }
    cores = cores_of(params, 2)
    optimizer = MaskedEMAAdamW(params.items(), lr=1e-2, weight_decay=0.5, isolation_ratio=0)
    frozen = freeze(optimizer, cores)
    for step in range(3):
        for name, param in params.items():
            param.grad = cut(gradient(name, step, torch.bfloat16), mesh, [Shard(0)])
        optimizer.step()
    return frozen, {name: param.detach().full_tensor() for name, param in params.items()}


def test_cores_freeze_sharded_parameters():
    before = weights_of(torch.bfloat16)
    cores = cores_of(before, 2)
    held = {name: union_mask(cores, name) for name in before}
    for count, after in on_ranks(2, sharded_run):
        assert count == sum(int(mask.sum()) for mask in held.values())
        for name, mask in held.items():
            assert torch.equal(after[name][mask], before[name][mask])
            assert mask.all() or not torch.equal(after[name][~mask], before[name][~mask])


@pytest.mark.parametrize("more", [(), ("--fsdp",)], ids=str)
def test_finetune_freezes_on_several_ranks(files, tmp_path, more):
    out = tmp_path / "out"
    flags = ["--freeze", files / "core7", files / "core8", *FREEZE, *more]
    first, _ = started(2, *arguments(files, out, *flags))
    held = frozen_of(files)
    count = sum(int(mask.sum()) for mask in held.values())
    assert first.status == 0 and f"frozen for good: {count} weights" in first.out, first.err
    before, after = load_file(files / "model" / "model.safetensors"), weights(out)
    for name, mask in held.items():
        assert torch.equal(after[name][mask], before[name][mask]), name
        assert not torch.equal(after[name], before[name]), name


def test_ranks_with_other_cores_are_refused(files, tmp_path):
    """The same names on two machines, say."""
    flags = ["--freeze", tmp_path / "core", *FREEZE]
    (tmp_path / "core").write_bytes((files / "core7").read_bytes())

    def other(original):
        return lambda paths, net: original([files / "core8"], net)

    patch = Patch(1, frozen, "_checked", other)
    for ended in started(2, *arguments(files, tmp_path / "out", *flags), prepare=patch):
        assert ended.status == 1
    assert not (tmp_path / "out").exists()
