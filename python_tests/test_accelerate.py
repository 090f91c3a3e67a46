"""accelerate.Accelerator with MaskedEMAAdamW: accumulation, clipping, an exact resume from its files."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedType,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from epi_kernels import MaskedEMAAdamW, enable_gradient_release, load_isolation, save_isolation
from epi_kernels.integrations import load_checkpoint, named_parameter_groups, save_checkpoint
from python_tests.ranks import on_ranks
from python_tests.simulated_device import OnDevice, simulated  # noqa: F401
from python_tests.test_transformers_trainer import Tokens
from python_tests.tiny_model import backend, tiny_llama


@pytest.fixture(autouse=True)
def _states_of_its_own():
    """Accelerate keeps one state a process, and a Trainer of another test may have set it."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make(model, **options):
    chosen = {"isolation_ratio": 0.1, "mask_interval": 2, "backend": backend()} | options
    return MaskedEMAAdamW(named_parameter_groups(model, weight_decay=0.03), lr=2e-3, **chosen)


class Run:
    """Steps of two batches each, their gradient clipped."""

    def __init__(self, seed=0, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_llama(seed)
        loader = DataLoader(Tokens(), batch_size=4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, make(model, **options), loader
        )

    @property
    def ours(self) -> MaskedEMAAdamW:
        return self.optimizer.optimizer

    def batches(self, first, last):
        for i, batch in enumerate(self.loader):
            if first <= i < last:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch).loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.optimizer.zero_grad()


def test_what_takes_an_optimizer_takes_accelerates_wrapper(tmp_path):
    run, other = Run(), Run(seed=1)
    run.batches(0, 6)
    save_checkpoint(tmp_path / "checkpoint", run.model, run.optimizer)
    load_checkpoint(tmp_path / "checkpoint", other.model, other.optimizer)
    masks = [one.ours.isolation_mask(param) for one in (run, other) for param in one.model.parameters()]
    half = len(masks) // 2
    assert all(map(torch.equal, masks[:half], masks[half:])) and any(mask.any() for mask in masks)
    save_isolation(run.optimizer, tmp_path / "isolation")
    load_isolation(other.optimizer, tmp_path / "isolation")
    enable_gradient_release(other.model, other.optimizer).remove()
    plain = torch.optim.AdamW(run.model.parameters())
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(TypeError, match="takes a MaskedEMAAdamW, got AdamW"):
            call(tmp_path / "checkpoint", run.model, plain)


def test_a_run_is_the_plain_loops():
    run, twin = Run(), tiny_llama()
    run.batches(0, 12)
    optimizer = make(twin)
    for i, batch in enumerate(DataLoader(Tokens(), batch_size=4)):
        if i == 12:
            break
        (twin(**batch).loss / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert run.ours.param_groups[0]["isolation_step"] == 6
    for (name, p), q in zip(run.model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=["fp32", "int8"])
def test_a_loaded_state_continues_with_the_same_bits(tmp_path, options):
    whole = Run(**options)
    whole.batches(0, 12)
    stopped = Run(**options)
    stopped.batches(0, 6)
    stopped.accelerator.save_state(tmp_path)

    resumed = Run(seed=9, **options)
    resumed.accelerator.load_state(tmp_path)
    masks = [resumed.ours.isolation_mask(p) for p in resumed.model.parameters()]
    assert any(bool(mask.any()) for mask in masks)
    resumed.batches(6, 12)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(whole.ours.isolation_mask(p), resumed.ours.isolation_mask(q)), name


def test_masks_selected_before_prepare_act_after_it():
    earlier, model = Run(), tiny_llama()
    earlier.batches(0, 12)
    optimizer = make(model, mask_interval=None)
    optimizer.carry_importance(earlier.ours)
    optimizer.refresh_isolation_mask()
    masks = [optimizer.isolation_mask(p) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]

    run = Run.__new__(Run)
    run.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    run.model, run.optimizer, run.loader = run.accelerator.prepare(
        model, optimizer, DataLoader(Tokens(), batch_size=4)
    )
    run.batches(0, 4)
    assert sum(int(mask.sum()) for mask in masks) >= int(0.1 * sum(p.numel() for p in model.parameters()))
    for p, mask, old in zip(model.parameters(), masks, before, strict=True):
        assert torch.equal(p[mask], old[mask]) and not torch.equal(p, old)


def fsdp2() -> Accelerator:
    """Accelerate plans FSDP2 for accelerators alone and turns to DDP on a CPU, unless it is told."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.transformer_cls_names_to_wrap = ["LlamaDecoderLayer"]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def under_fsdp2(rank: int) -> dict:
    """Two steps of FSDP2 as Accelerate prepares it, with a refresh after the second; masks and weights, whole."""
    accelerator, model = fsdp2(), tiny_llama()
    model, optimizer = accelerator.prepare(model, make(model))
    assert all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
    return two_steps(accelerator.backward, model, optimizer, optimizer.optimizer)


def trained_before(**options):
    """A model and an optimizer that carries the importance of three steps, refreshed."""
    earlier = tiny_llama()
    first = make(earlier)
    for _ in range(2):
        two_steps(lambda loss: loss.backward(), earlier, first, first)
    model = tiny_llama()
    optimizer = make(model, **options)
    optimizer.carry_importance(first.state_dict())
    assert optimizer.refresh_isolation_mask().isolated > 0
    return model, optimizer


def carried_before_prepare(rank: int) -> dict:
    model, optimizer = trained_before()
    accelerator = fsdp2()
    model, optimizer = accelerator.prepare(model, optimizer)
    found = two_steps(accelerator.backward, model, optimizer, optimizer.optimizer)
    assert set(optimizer.optimizer.state_dict()["state"]) == set(range(len(found)))
    return found


def test_what_was_carried_before_prepare_goes_on_with_the_shards():
    model, alone = trained_before()
    expected = two_steps(lambda loss: loss.backward(), model, alone, alone)
    for found in on_ranks(2, carried_before_prepare):
        for name, (weight, mask) in expected.items():
            assert torch.equal(found[name][0], weight) and torch.equal(found[name][1], mask), name


@pytest.mark.parametrize("placement", [None, [True, False]])
def test_offloaded_states_are_on_the_host_after_prepare(simulated, monkeypatch, placement):  # noqa: F811
    """It moves what is there to its device and loads it back, unless it is told to leave the optimizer alone."""
    moved = []

    def move(value):
        moved.append(value)
        return value.as_subclass(OnDevice)

    monkeypatch.setattr(
        "accelerate.optimizer.move_to_device", lambda tree, device: tree_map_only(torch.Tensor, move, tree)
    )
    model, alone = trained_before()
    expected = two_steps(lambda loss: loss.backward(), model, alone, alone)
    accelerator, (model, optimizer) = Accelerator(cpu=True), trained_before(offload="cpu")
    model, optimizer = accelerator.prepare(model, optimizer, device_placement=placement)
    assert bool(moved) == (placement is None)
    held = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    assert held and all(type(value) is torch.Tensor for value in held)
    for name, pair in two_steps(accelerator.backward, model, optimizer, optimizer.optimizer).items():
        assert all(map(torch.equal, pair, expected[name])), name


def saved_and_loaded(rank: int, folder: str, kind: str) -> tuple[list[str], int]:
    """What differs after two more steps of the run that was saved and of a fresh one that loaded it; and its T."""
    accelerator, runs = fsdp2(), []
    plugin = AcceleratorState._shared_state["fsdp_plugin"]
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the kind that is asked for
    plugin.set_state_dict_type(kind)
    for seed in (0, 9):
        model = tiny_llama(seed)
        AcceleratorState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )  # `prepare` takes it back on a CPU
        model, optimizer = accelerator.prepare(model, make(model, state_dtype="int8", importance_beta=0.9))
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        if not runs:
            param = optimizer.optimizer.param_groups[0]["params"][0]
            mask = torch.arange(param.numel()).view(param.shape) % 3 == 0
            optimizer.optimizer.set_isolation_mask(param, mask, persistent=True)
            two_steps(accelerator.backward, model, optimizer, optimizer.optimizer)
            save_fsdp_model(plugin, accelerator, model, folder)
            save_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, model, folder)
        else:
            load_fsdp_model(plugin, accelerator, model, folder)
            load_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, model, folder)
        runs.append(two_steps(accelerator.backward, model, optimizer, optimizer.optimizer))
    differing = [name for name, pair in runs[0].items() if not all(map(torch.equal, pair, runs[1][name]))]
    return differing, optimizer.optimizer.param_groups[0]["isolation_step"]


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_what_accelerate_saves_of_fsdp2_goes_on_with_the_same_bits(kind, tmp_path):
    """8-bit states, own importance and a persistent mask included."""
    assert on_ranks(2, saved_and_loaded, str(tmp_path), kind) == [([], 4), ([], 4)]


def two_steps(backward, model, optimizer, ours) -> dict:
    for step in range(2):
        batch = torch.randint(60, (2, 8), generator=torch.Generator().manual_seed(step))
        backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    found = {}
    for group in ours.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            found[name] = whole(param.detach()), whole(ours.isolation_mask(param))
    return found


def test_fsdp2_puts_shards_in_the_place_of_parameters_and_the_masks_are_one_process():
    model = tiny_llama()
    alone = make(model)
    expected = two_steps(lambda loss: loss.backward(), model, alone, alone)
    assert sum(int(mask.sum()) for _, mask in expected.values()) > 0
    for found in on_ranks(2, under_fsdp2):  # both with the same batch: equal gradients, whose mean is exact
        assert found.keys() == expected.keys()
        for name, (weight, mask) in expected.items():
            assert torch.equal(found[name][0], weight) and torch.equal(found[name][1], mask), name
