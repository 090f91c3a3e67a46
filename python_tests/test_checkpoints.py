"""save_checkpoint and load_checkpoint: by name, whole or not at all, between sharded and whole parameters."""

from __future__ import annotations

import pathlib
import shutil

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import fully_shard

from epi_kernels import AdaptiveInterval, MaskedEMAAdamW
from epi_kernels.integrations.checkpoints import load_checkpoint, save_checkpoint
from python_tests.ranks import Failed, on_ranks, outcomes
from python_tests.sharded import whole
from python_tests.sharded_net import contents, differing, made, persistent, steps


def keep(rank: int, folder: str, case: str, sharded: bool) -> dict:
    net, optimizer = made(case, sharded=sharded)
    optimizer.set_isolation_mask(net.b, persistent(net.b), persistent=True)
    steps(net, optimizer, 0, 5)
    save_checkpoint(folder, net, optimizer)
    found = contents(net, optimizer)
    steps(net, optimizer, 5, 6)
    save_checkpoint(folder, net, optimizer)  # over the first one
    return found | {"later": contents(net, optimizer)}


def restore(rank: int, folder: str, case: str, sharded: bool) -> dict:
    net, optimizer = made(case, sharded=sharded)
    load_checkpoint(folder, net, optimizer)
    return contents(net, optimizer)


@pytest.mark.parametrize("ways", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_our_checkpoints_go_between_sharded_and_whole_parameters(ways, tmp_path):
    folder = str(tmp_path / "last")
    ranks = [2 if sharded else 1 for sharded in ways]
    saved = on_ranks(ranks[0], keep, folder, "float32", ways[0])[0]["later"]
    for loaded in on_ranks(ranks[1], restore, folder, "float32", ways[1]):
        for key, value in saved.items():
            if key[-1] not in ("isolation_mask", "persistent_mask"):  # packed, or not: isolated says it
                assert torch.equal(loaded[key], value), key
        lasting = [one["b", "persistent_mask"] for one in (saved, loaded)]
        assert all(bool(one.any()) for one in lasting)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def damaged(rank: int, folder: str, damage: str):
    """(what is heard, what has changed)"""
    net, optimizer = made("float32", sharded=True)
    steps(net, optimizer, 0, 3)
    save_checkpoint(folder, net, optimizer)
    torch.distributed.barrier()
    if rank == 0 and damage == "cut off":
        file = sorted(pathlib.Path(folder).glob("*.distcp"))[1]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    torch.distributed.barrier()
    if damage == "another model":
        other = nn.Linear(3, 3)
        fully_shard(other)
        fresh = MaskedEMAAdamW(other.named_parameters())
        weights = [whole(param.detach()).clone() for param in other.parameters()]
        try:
            load_checkpoint(folder, other, fresh)
        except ValueError as error:
            now = [whole(param.detach()) for param in other.parameters()]
            return str(error), [one for one, two in zip(weights, now) if not torch.equal(one, two)]
        return None
    other, fresh = made("float32", sharded=True)
    steps(other, fresh, 7, 9)
    before = contents(other, fresh)
    try:
        load_checkpoint(folder, other, fresh)
    except CheckpointException as error:
        return type(error).__name__, differing(contents(other, fresh), before)
    return None


@pytest.mark.parametrize(
    "damage, says", [("cut off", "CheckpointException"), ("another model", "of another model")]
)
def test_a_damaged_or_foreign_checkpoint_is_refused_on_every_rank_and_changes_nothing(damage, says, tmp_path):
    for heard, changed in on_ranks(2, damaged, str(tmp_path / "last"), damage, timeout=60):
        assert says in heard and changed == []


def mixed(rank: int, folder: str):
    """What a load says of a directory with rank 1's file of an earlier save, and what has changed."""
    net, optimizer = made("float32", sharded=True)
    steps(net, optimizer, 0, 3)
    save_checkpoint(f"{folder}/early", net, optimizer)
    steps(net, optimizer, 3, 5)
    save_checkpoint(f"{folder}/late", net, optimizer)
    if rank == 0:
        shutil.copy(f"{folder}/early/__1_0.distcp", f"{folder}/late")
    torch.distributed.barrier()
    other, fresh = made("float32", sharded=True)
    steps(other, fresh, 7, 9)
    before = contents(other, fresh)
    with pytest.raises(ValueError) as refused:
        load_checkpoint(f"{folder}/late", other, fresh)
    return str(refused.value), differing(contents(other, fresh), before)


def test_files_of_two_saves_in_one_directory_are_refused_on_every_rank(tmp_path):
    """Their sizes are the same, and torch looks at no more."""
    for heard, changed in on_ranks(2, mixed, str(tmp_path)):
        assert "late: files of 2 saves are mixed in it" in heard and changed == []


class One(nn.Module):
    """A mask of one element has the shape of its parameter, packed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(5, 3))


def one_element(rank: int, folder: str) -> list[list[bool]]:
    net = One()
    optimizer = MaskedEMAAdamW(net.named_parameters(), isolation_ratio=0.0)
    optimizer.set_isolation_mask(net.scale, torch.ones(1, dtype=torch.bool), persistent=True)
    net.weight.grad, net.scale.grad = torch.ones(5, 3), torch.ones(1)
    optimizer.step()
    save_checkpoint(folder, net, optimizer)
    other = One()
    fully_shard(other)
    fresh = MaskedEMAAdamW(other.named_parameters(), isolation_ratio=0.0)
    load_checkpoint(folder, other, fresh)
    return [whole(fresh.isolation_mask(param)).flatten().tolist() for param in other.parameters()]


def test_a_parameter_of_one_element_goes_from_whole_to_sharded(tmp_path):
    for masks in on_ranks(2, one_element, str(tmp_path / "last")):
        assert masks == [[True], [False] * 15]


def test_metadata_of_flipped_bits_are_refused_as_damaged_or_by_torch(saved):
    """A damaged pickle raises anything, an import of a module that nobody has among others."""
    mark = saved[0] / ".metadata"
    whole_one, heard = mark.read_bytes(), []
    net = linears()
    optimizer = make(list(net.parameters()))
    for byte in range(12, 60):  # the first names of modules and classes
        mark.write_bytes(whole_one[:byte] + bytes([whole_one[byte] ^ 4]) + whole_one[byte + 1 :])
        try:
            load_checkpoint(saved[0], net, optimizer)
        except (ValueError, CheckpointException) as error:
            heard.append(str(error))
    assert len(heard) > 24 and any("ModuleNotFoundError" in one for one in heard)


def test_a_crash_between_the_renames_of_a_save_leaves_the_old_checkpoint(tmp_path):
    folder = tmp_path / "last"
    saved = on_ranks(1, keep, str(folder), "float32", False)[0]["later"]
    folder.rename(tmp_path / "last.old")
    (loaded,) = on_ranks(1, restore, str(folder), "float32", False)
    assert differing(loaded, saved) == []
    with pytest.raises(FileNotFoundError, match="/nothing: no checkpoint"):
        load_checkpoint(tmp_path / "nothing", *made("float32", sharded=False))


# --- one process: names, whatever the optimizer has made yet ----------------------------------------------------


def linears() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # two weights of one shape


def trained(net: nn.Module, optimizer: MaskedEMAAdamW, n: int = 3) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(n):
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=generator) if param.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()


def second_moments(net: nn.Module, optimizer: MaskedEMAAdamW) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[param]["exp_avg_sq"].clone() for name, param in net.named_parameters()}


def make(params, **options) -> MaskedEMAAdamW:
    return MaskedEMAAdamW(params, **({"isolation_ratio": 0.2, "mask_interval": 2} | options))


@pytest.fixture
def saved(tmp_path):
    """(path, second moments by name) of an optimizer without names, in the model's order."""
    net = linears()
    optimizer = make(list(net.parameters()))
    trained(net, optimizer)
    save_checkpoint(tmp_path / "last", net, optimizer)
    return tmp_path / "last", second_moments(net, optimizer)


@pytest.mark.parametrize(
    "before", ["a mask was set", "gradients are there", "one parameter was stepped", "reversed"]
)
def test_every_parameter_gets_its_own_state(saved, before):
    path, expected = saved
    net = linears()
    params = list(net.parameters())
    optimizer = make(params[::-1] if before == "reversed" else params)
    if before == "a mask was set":
        optimizer.set_isolation_mask(params[0], torch.ones(4, 4, dtype=torch.bool))
    elif before == "gradients are there":
        net(torch.ones(4)).sum().backward()
    elif before == "one parameter was stepped":
        params[1].grad = torch.ones(4)
        optimizer.step()
    load_checkpoint(path, net, optimizer)
    assert differing(second_moments(net, optimizer), expected) == []
    assert optimizer.param_groups[0]["isolation_step"] == 3


def test_a_parameter_that_was_frozen_since_keeps_its_masks(tmp_path):
    net = linears()
    optimizer = make(net.named_parameters())
    optimizer.set_isolation_mask(net[1].weight, torch.eye(4, dtype=torch.bool), persistent=True)
    trained(net, optimizer)
    net[1].requires_grad_(False)
    save_checkpoint(tmp_path / "last", net, optimizer)
    other = linears()
    other[1].requires_grad_(False)
    fresh = make(other.named_parameters())
    load_checkpoint(tmp_path / "last", other, fresh)
    assert fresh.isolation_mask(other[1].weight).diagonal().all()
    for one, two in ((net, optimizer), (other, fresh)):
        trained(one, two)
    for param, mine in zip(net.parameters(), other.parameters()):
        assert torch.equal(param, mine) and torch.equal(
            optimizer.isolation_mask(param), fresh.isolation_mask(mine)
        )


def test_other_settings_that_a_state_dict_may_meet(saved):
    path, expected = saved
    net = linears()
    optimizer = make(net.named_parameters(), mask_interval=AdaptiveInterval(4), lr=torch.tensor(0.5))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    load_checkpoint(path, net, optimizer)
    assert differing(second_moments(net, optimizer), expected) == []
    lr = optimizer.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor) and float(lr) == pytest.approx(1e-3)


def test_other_groups_and_other_parameters_are_refused(saved):
    path, _ = saved
    net = linears()
    params = list(net.parameters())
    before = [param.detach().clone() for param in params]
    for groups in ([{"params": params[:2]}, {"params": params[2:]}], [{"params": params[:3]}]):
        optimizer = make(groups)
        with pytest.raises(ValueError, match="grouped otherwise|lacks"):
            load_checkpoint(path, net, optimizer)
        assert not optimizer.state and all(map(torch.equal, params, before))


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    net = linears()
    with pytest.raises(ValueError, match="is no checkpoint"):
        save_checkpoint(tmp_path / "notes", net, make(net.named_parameters()))
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "mine.txt"]


def cannot_be_put_in_place(rank: int, folder: str) -> None:
    net, optimizer = made("float32", sharded=True)
    steps(net, optimizer, 0, 1)
    save_checkpoint(folder, net, optimizer)
    if rank == 0:
        pathlib.Path(folder + ".old").write_text("in the way")
    torch.distributed.barrier()
    save_checkpoint(folder, net, optimizer)


def test_a_save_that_fails_on_the_first_rank_is_heard_on_all(tmp_path):
    for heard in outcomes(2, cannot_be_put_in_place, str(tmp_path / "last"), timeout=60):
        assert isinstance(heard, Failed) and heard.kind == "NotADirectoryError"
    assert (tmp_path / "last" / ".metadata").exists()


def one_rank_refuses(rank: int, folder: str, what: str) -> tuple[str, bool]:
    """What is heard, and whether the ranks can still talk."""
    net = linears()
    optimizer = make(net.named_parameters())
    trained(net, optimizer)
    save_checkpoint(folder, net, optimizer)
    if rank == 1 and what == "another model":
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
        optimizer = make(net.named_parameters())
    elif rank == 1 and what == "no such path":
        folder += "-elsewhere"
    elif rank == 1 and what == "other groups":
        optimizer = make([{"params": list(net[0].parameters())}, {"params": list(net[1].parameters())}])
    try:
        if what == "another model at a save":
            model = linears() if rank == 1 else net  # whose parameters the optimizer has not
            save_checkpoint(folder, model, optimizer)
        else:
            load_checkpoint(folder, net, optimizer)
    except (ValueError, FileNotFoundError) as error:
        return str(error), torch.distributed.barrier() is None
    return "nothing", False


@pytest.mark.parametrize("what", ["another model", "no such path", "other groups", "another model at a save"])
def test_what_one_rank_refuses_is_heard_on_all(what, tmp_path):
    (first, alive), (second, as_well) = on_ranks(
        2, one_rank_refuses, str(tmp_path / "last"), what, timeout=60
    )
    assert first == f"rank 1: {second}" and alive and as_well


def pipelined(rank: int, folder: str) -> str:
    net = linears()
    optimizer = make(net[rank].named_parameters(prefix=str(rank)))
    optimizer.set_process_group(torch.distributed.group.WORLD)
    with pytest.raises(ValueError) as refused:
        save_checkpoint(folder, net, optimizer)
    return str(refused.value)


def test_pipeline_stages_are_refused(tmp_path):
    for heard in on_ranks(2, pipelined, str(tmp_path / "last")):
        assert "set_process_group" in heard
    assert list(tmp_path.iterdir()) == []
