"""save_isolation and load_isolation: masks and importance through a file, to the bit, all or nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epi_kernels import MaskedEMAAdamW, load_isolation, save_isolation
from epi_kernels.finetune import checkpoint, protect
from epi_kernels.finetune import command as finetune
from epi_kernels.finetune.errors import UserError
from epi_kernels.integrations import named_parameter_groups
from epi_kernels.optim import exchange
from epi_kernels.reference import bits, codec
from python_tests import finetune_runs
from python_tests.exchange_runs import STORAGES, model, own, trained
from python_tests.harness import (
    Target,
    assert_same_bits,
    assert_same_run,
    make,
    stored,
    tensor_bytes,
    train,
)
from python_tests.tiny_model import command


@pytest.mark.parametrize("target", [Target("reference"), Target("cpu")], indirect=True, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_round_trip_to_the_bit(target, storage, tmp_path):
    """As carry_importance and set_isolation_mask would have it from the optimizer itself, and so is what follows."""
    dtype, arguments = STORAGES[storage]
    arguments = arguments | {"backend": target.backend}
    params, source = trained(dtype, **arguments)
    save_isolation(source, tmp_path / "file")
    key = "importance" if own(arguments) else "exp_avg_sq"
    loaded_params, by_hand_params = model(dtype, seed=1), model(dtype, seed=1)
    loaded, by_hand = make(loaded_params, **arguments), make(by_hand_params, **arguments)
    load_isolation(loaded, tmp_path / "file")
    for name, p in params.items():
        q = loaded_params[name]
        assert (name == "scale") == (q not in loaded.state)
        if name == "scale":
            continue
        state, expected = loaded.state[q], source.state[p]
        assert_same_bits(stored(state, key), stored(expected, key), f"{key} of {name}")
        assert state["step"].item() == (0 if own(arguments) else 5) and not state["exp_avg"].any()
        for mask in ("isolation_mask", "persistent_mask"):
            assert (mask in state) == (mask in expected)
            assert mask not in expected or torch.equal(state[mask], expected[mask])
    assert loaded.param_groups[0]["isolation_step"] == 0 and loaded.isolation_report() is None

    by_hand.carry_importance(source)
    for name, p in params.items():
        state = source.state.get(p, {})
        for mask in ("persistent_mask", "isolation_mask"):
            if mask in state:
                given = bits.unpack(state[mask], p.numel()).view(p.shape)
                by_hand.set_isolation_mask(by_hand_params[name], given, persistent=mask == "persistent_mask")
    assert_same_run(loaded, by_hand)
    before = {name: p.detach().clone() for name, p in loaded_params.items()}
    train(loaded, loaded_params, 1)
    for name, p in loaded_params.items():
        isolated = source.isolation_mask(params[name])
        assert torch.equal(p[isolated], before[name][isolated])
    train(loaded, loaded_params, range(1, 4))
    train(by_hand, by_hand_params, 4)
    assert_same_run(loaded, by_hand)


def test_float64_goes_through_as_it_is(tmp_path):
    _, source = trained(torch.float64)
    save_isolation(source, tmp_path / "file")
    loaded = make(model(torch.float64, seed=1))
    load_isolation(loaded, tmp_path / "file")
    save_isolation(loaded, tmp_path / "again")
    first, second = load_file(tmp_path / "file"), load_file(tmp_path / "again")
    assert first["head.weight"].dtype == torch.float64 and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_square_that_overflowed_goes_through_and_no_number_is_written(tmp_path):
    """Of a gradient of 1e30, after which the weights are as well as before. A NaN is in the weights, too."""
    weight = torch.nn.Parameter(torch.ones(5))
    source = MaskedEMAAdamW([("w", weight)], isolation_ratio=0.4, backend="reference")
    weight.grad = torch.tensor([1e30, 1.0, 2.0, 3.0, 4.0])
    source.step()
    save_isolation(source, tmp_path / "file")
    loaded = MaskedEMAAdamW([("w", weight)], isolation_ratio=0.4, backend="reference")
    load_isolation(loaded, tmp_path / "file")
    assert weight.isfinite().all() and loaded.refresh_isolation_mask().nonfinite == 1
    assert loaded.isolation_mask(weight).tolist() == [False, False, False, True, True]
    weight.grad = torch.tensor([0.0, torch.nan, 0.0, 0.0, 0.0])
    source.step()
    written = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match="importance of w has values that are not a number"):
        save_isolation(source, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == written


def test_what_is_in_the_file(tmp_path):
    params, source = trained(torch.bfloat16, state_dtype="int8")
    save_isolation(source, tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    stepped = set(params) - {"scale"}
    assert tensors.keys() == (
        stepped | {f"isolation_mask/{name}" for name in stepped} | {"persistent_mask/embed"}
    )
    assert {tensors[name].dtype for name in stepped} == {torch.float32, torch.bfloat16}
    head = source.state[params["head.weight"]]
    assert head["exp_avg_sq"].dtype == torch.uint8
    assert_same_bits(
        tensors["head.weight"].float().numpy().reshape(-1),
        stored(head, "exp_avg_sq"),
        "8-bit codes as bfloat16",
    )
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("epi-kernels isolation", "1")
    assert (metadata["isolation_step"], metadata["isolation_ratio"]) == ("5", "0.2")
    records = json.loads(metadata["parameters"])
    assert records["head.weight"] == {
        "shape": [65, 67],
        "step": 5,
        "beta": 0.999,
        "masks": ["isolation_mask"],
    }
    assert records["scale"] == {"shape": [], "step": None, "masks": []}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_8_bit_value_is_a_bfloat16():
    codes = torch.tensor([0] * 4 + [*range(4, 256)], dtype=torch.uint8)  # 1 .. 3 are never written
    for scale in (*range(231), codec.NONFINITE):
        values = codec.decode(codes, torch.full((4,), scale, dtype=torch.uint8), signed=False)
        assert torch.equal(values.bfloat16().float(), values), scale
    beyond = torch.full((64,), torch.finfo(torch.float32).max)
    below = codec.encode(torch.full((64,), 2.0**127 * 1.9), None, signed=False)[1]
    assert codec.encode(beyond, None, signed=False)[1].item() == codec.NONFINITE and below.item() == 230


def test_masks_alone_and_importance_alone(tmp_path):
    params, source = trained()
    save_isolation(source, tmp_path / "file")
    mine = model(seed=1)
    optimizer = make(mine)
    train(optimizer, mine, 3)
    optimizer.set_isolation_mask(mine["head.weight"], torch.ones(65, 67, dtype=torch.bool), persistent=True)
    optimizer.set_isolation_mask(mine["scale"], torch.tensor(True), persistent=True)
    moments = {
        key: value.clone() for key, value in optimizer.state[mine["embed"]].items() if "mask" not in key
    }
    load_isolation(optimizer, tmp_path / "file", importance=False)
    assert optimizer.param_groups[0]["isolation_step"] == 3 and optimizer.isolation_report() is not None
    assert all(torch.equal(optimizer.state[mine["embed"]][key], value) for key, value in moments.items())
    for name, p in mine.items():  # the file's in place of its own, persistent ones too
        assert torch.equal(optimizer.isolation_mask(p), source.isolation_mask(params[name]))
        assert ("persistent_mask" in optimizer.state[p]) == (name == "embed")

    kept = {name: optimizer.isolation_mask(p) for name, p in mine.items()}
    _, other = trained(steps=2)
    save_isolation(other, tmp_path / "other")
    load_isolation(optimizer, tmp_path / "other", masks=False)
    assert optimizer.param_groups[0]["isolation_step"] == 0
    assert all(torch.equal(optimizer.isolation_mask(p), kept[name]) for name, p in mine.items())
    assert optimizer.state[mine["embed"]]["step"].item() == 2
    with pytest.raises(ValueError, match="loads nothing"):
        load_isolation(optimizer, tmp_path / "file", masks=False, importance=False)


def test_into_another_storage_and_by_name(tmp_path):
    """Shared bfloat16 into an own float32, in another order, under DDP's and torch.compile's names."""
    params, source = trained(torch.bfloat16)
    save_isolation(source, tmp_path / "file")
    mine = {f"module._orig_mod.{name}": p for name, p in reversed(model(seed=1).items())}
    optimizer = make(mine, importance_beta=0.9)
    load_isolation(optimizer, tmp_path / "file")
    for name, p in params.items():
        q = mine[f"module._orig_mod.{name}"]
        assert torch.equal(optimizer.isolation_mask(q), source.isolation_mask(p))
        if name != "scale":
            assert torch.equal(optimizer.state[q]["importance"], source.state[p]["exp_avg_sq"].float())
            assert not optimizer.state[q]["exp_avg_sq"].any() and optimizer.state[q]["step"].item() == 0
    save_isolation(optimizer, tmp_path / "again")
    assert load_file(tmp_path / "again").keys() == load_file(tmp_path / "file").keys()


def test_corrections_of_weights_stay_with_the_weights(tmp_path):
    _, source = trained(torch.bfloat16, master_weight_bits=24)
    save_isolation(source, tmp_path / "file")
    assert not any("correction" in name for name in load_file(tmp_path / "file"))
    mine = model(torch.bfloat16, seed=1)
    optimizer = make(mine, master_weight_bits=24)
    train(optimizer, mine, 3)
    before = {name: optimizer.master_weight(p) for name, p in mine.items()}
    load_isolation(optimizer, tmp_path / "file")
    assert all(torch.equal(optimizer.master_weight(p), before[name]) for name, p in mine.items())


# --- what `epi-kernels finetune --protect` makes of it ------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "int8", "own-bfloat16"])
def test_protect_reads_it(storage, tmp_path):
    dtype, arguments = STORAGES[storage]
    params, source = trained(dtype, **arguments)
    save_isolation(source, tmp_path / "file")
    shapes = {name: p.shape for name, p in params.items()}
    loaded = protect.load(str(tmp_path / "file"), shapes, (0.9, 0.999), None, True)
    assert loaded.description == "an optimizer's importance after step 5" and loaded.weights is None
    key, beta = ("importance", 0.9) if own(arguments) else ("exp_avg_sq", 0.999)
    for index, (name, p) in enumerate(params.items()):
        mean = loaded.state_dict["state"][index]["exp_avg_sq"]
        assert mean.dtype == torch.float32 and mean.shape == p.shape
        if name == "scale":
            assert not mean.any()
        else:
            expected = torch.from_numpy(stored(source.state[p], key)).view(p.shape) / (1 - beta**5)
            assert tensor_bytes(mean) == tensor_bytes(expected)


def test_protect_refuses_what_does_not_fit(tmp_path):
    saved = tmp_path / "saved"
    save_isolation(trained()[1], saved)
    shapes = {name: p.shape for name, p in model().items()}
    with pytest.raises(UserError, match="belongs to another model"):
        protect.load(str(saved), shapes | {"late": torch.Size([2])}, (0.9, 0.999), None, True)
    tensors = load_file(saved)
    save_file(tensors, tmp_path / "damaged", {"format": exchange.FORMAT, "version": "1"})
    with pytest.raises(UserError, match="--protect .*damaged: damaged"):
        protect.load(str(tmp_path / "damaged"), shapes, (0.9, 0.999), None, True)


def test_protect_takes_the_same_from_a_run_and_from_its_optimizers_file(tmp_path):
    from transformers import AutoModelForCausalLM

    files = finetune_runs.write_inputs(tmp_path)
    more = ["--max-steps", 3, "--isolation-ratio", 0.05, "--mask-interval", 2]
    first = tmp_path / "first"
    assert command(finetune, *finetune_runs.arguments(files, first, *more)) == 0
    (last,) = checkpoint.list_checkpoints(first)
    optimizer = MaskedEMAAdamW(
        named_parameter_groups(AutoModelForCausalLM.from_pretrained(first), weight_decay=0.01)
    )
    optimizer.load_state_dict(checkpoint.load_optimizer(last)["optimizer"])
    save_isolation(optimizer, tmp_path / "isolation.safetensors")
    outs = []
    for name in ("first", "isolation.safetensors"):
        outs.append(tmp_path / f"protecting-{name}")
        protected = finetune_runs.arguments(files, outs[-1], *more, "--protect", tmp_path / name)
        assert command(finetune, *protected) == 0
        (refresh, *_) = finetune_runs.events(outs[-1], "refresh")
        assert refresh["step"] == 0 and refresh["isolated"] > 0
    assert finetune_runs.same_weights(*outs)
