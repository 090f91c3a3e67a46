"""`epi-kernels memory`: what it prints is what optimizers own, and what a process takes."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epi_kernels import MaskedEMAAdamW, architectures, footprint, memory, published
from epi_kernels.training import state_bytes
from python_tests.tiny_model import backend, command, tiny_llama, write_config

GB = 10**9
PUBLISHED_COUNTS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Qwen2-7B": 7_615_616_512,
    "Gemma-2-9B": 9_241_705_984,
    "Llama-3.2-1B": 1_235_814_400,
}
# Tied embeddings of 9,632 elements, no multiple of 64, beside tensors too small for 8-bit states.
VOCABULARY = {"vocab_size": 301}


def printed(capsys, *arguments: object) -> dict:
    assert command(memory, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def totals(facts: dict) -> dict[str, int]:
    return {row["name"]: row["total_bytes"] for row in facts["optimizers"]}


# --- architectures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_architectures_have_their_published_number_of_parameters(name: str):
    assert sum(memory.model_sizes(name)) == PUBLISHED_COUNTS[name]


# --- bytes from sizes and options -------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (7,), (63, 65), (4096,), (4097,), (64, 129)]
INT8 = {"state_dtype": "int8"}
OWN = {"importance_beta": 0.9}
OPTIONS = [
    {},
    {"isolation_ratio": 0.0},
    {"state_dtype": torch.float32},
    {"state_dtype": torch.bfloat16},
    INT8,
    INT8 | {"isolation_ratio": 0.0},
    {"state_dtype": "int4"},
    OWN,
    OWN | {"importance_dtype": torch.bfloat16},
    OWN | {"importance_dtype": "int8"},
    INT8 | OWN,
    INT8 | OWN | {"importance_dtype": "int8"},
    {"master_weight_bits": 24},
    INT8 | {"master_weight_bits": 32},
    {"importance_beta": 0.999},  # beta2: shared
    {"importance_beta": 0.999, "betas": (0.9, 0.95)},
]


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    for one in made:
        one.grad = torch.ones_like(one)
    return made


SIZES = [math.prod(shape) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ours_are_what_the_optimizer_counts(dtype: torch.dtype, options: dict):
    optimizer = MaskedEMAAdamW(parameters(dtype), backend="reference", **options)
    optimizer.step()
    assert footprint.masked_ema_adamw(SIZES, dtype, **options) == optimizer.state_bytes()


@pytest.mark.parametrize("ratio", [0.0, 0.01])
def test_persistent_masks_are_counted_with_the_masks_that_steps_read(ratio: float):
    params = parameters(torch.float32)
    optimizer = MaskedEMAAdamW(params, backend="reference", isolation_ratio=ratio)
    for param in params:
        optimizer.set_isolation_mask(param, torch.ones(param.shape, dtype=torch.bool), persistent=True)
    optimizer.step()
    counted = footprint.masked_ema_adamw(SIZES, torch.float32, isolation_ratio=ratio, persistent_masks=True)
    assert counted == optimizer.state_bytes()
    assert counted["isolation_mask"] == counted["persistent_mask"] > 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("options", [{}, {"isolation_ratio": 0.0}, INT8 | OWN], ids=str)
def test_ours_without_state_for_isolated_rows(share: float, options: dict):
    """In tensors whose rows have one element each, so that any share is one of whole rows."""
    sizes = [7000, 8192, 1000, 15]
    params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    optimizer = MaskedEMAAdamW(params, backend="cpu", isolation_granularity="row", **options)
    for param, n in zip(params, sizes, strict=True):
        param.grad = torch.ones_like(param)
        isolated = n if share == 1 else math.floor(share * n) // 64 * 64
        if isolated:
            optimizer.set_isolation_mask(param, torch.arange(n) < isolated, persistent=True)
    optimizer.step()
    counted = footprint.masked_ema_adamw(sizes, torch.float32, **options, isolated_rows_share=share)
    assert counted == optimizer.state_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamws_are_what_torch_holds(dtype: torch.dtype):
    optimizer = torch.optim.AdamW(parameters(dtype))
    optimizer.step()
    assert footprint.adamw(SIZES, dtype) == state_bytes(optimizer)


# --- the table beside real steps --------------------------------------------------------------------------------


def held_bytes(*tensors: torch.Tensor) -> int:
    """Of the storages behind them, each once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def trained(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """A tiny Llama's parameters, with the gradients of a backward pass."""
    net = tiny_llama(dtype=dtype, **VOCABULARY)
    tokens = torch.arange(24).view(2, 12)
    net(input_ids=tokens, labels=tokens).loss.backward()
    return list(net.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_the_bytes_that_one_step_leaves_behind(dtype: str, tmp_path, capsys):
    config = write_config(tmp_path, **VOCABULARY)
    facts = printed(capsys, "--model", config, "--dtype", dtype)
    said = totals(facts)
    params = trained(memory.DTYPES[dtype])
    grads = [one.grad for one in params]
    assert facts["weights_bytes"] == facts["gradients_bytes"] == held_bytes(*params) == held_bytes(*grads)
    assert facts["parameters"] == sum(one.numel() for one in params)
    optimizers = {"torch AdamW": torch.optim.AdamW(params)}
    for name, options in memory.ours(memory.DTYPES[dtype]).items():
        optimizers[name] = MaskedEMAAdamW(params, backend=backend(), mask_interval=1, **options)
    for name, optimizer in optimizers.items():
        optimizer.step()
        assert said[name] == held_bytes(*params, *grads, *states(optimizer)), name
    if dtype == "bfloat16":
        masters = [torch.nn.Parameter(one.detach().float()) for one in params]
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad.float()
        optimizer = torch.optim.AdamW(masters)
        optimizer.step()
        held = held_bytes(*params, *grads, *masters, *states(optimizer))
        assert said["torch AdamW, float32 master weights and states"] == held


# Each optimizer in turn over parameters of these sizes: the process's peak above what it held before the weights.
WORKER = """
import ctypes, gc, json, sys, torch
from epi_kernels import MaskedEMAAdamW, memory

def kib(field):
    return int(next(x for x in open("/proc/self/status") if x.startswith(field)).split()[1])

def run(sizes, name, dtype):
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in sizes]
    for one in params:
        one.grad = torch.full_like(one, 0.5)
    if name == "torch AdamW":
        optimizer = torch.optim.AdamW(params, fused=True)
    else:
        optimizer = MaskedEMAAdamW(params, backend="cpu", mask_interval=2, **memory.ours(dtype)[name])
    for _ in range(4):  # two refreshes
        optimizer.step()

sizes = json.loads(sys.argv[1])
torch.set_num_threads(1)
peaks = {}
for dtype_name, dtype in memory.DTYPES.items():
    peaks[dtype_name] = {}
    for name in ("torch AdamW", *memory.ours(dtype)):
        run([5000, 5000], name, dtype)  # loads what is loaded once
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what runs before have freed
        open("/proc/self/clear_refs", "w").write("5")
        before = kib("VmRSS")
        run(sizes, name, dtype)
        peaks[dtype_name][name] = (kib("VmHWM") - before) * 1024
print(json.dumps(peaks))
"""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(backend() != "cpu", reason="the reference backend makes temporaries")
def test_peaks_of_a_process_are_the_sums(tmp_path):
    """Of every configuration of ours that is listed."""
    config = write_config(tmp_path, vocab_size=4000, hidden_size=512, intermediate_size=1408)
    sizes = memory.model_sizes(str(config))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps(sizes)],
        env=os.environ | MALLOC, cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for dtype, peaks in json.loads(done.stdout).items():
        said = totals(memory.report("", sizes, dtype))
        assert len(peaks) == 1 + len(memory.ours(memory.DTYPES[dtype]))
        for name, peak in peaks.items():
            # Pages, and what steps and refreshes keep whatever the size: up to 1.0 MiB. A byte a parameter would be 7.6.
            assert peak == pytest.approx(said[name], abs=2 << 20), (dtype, name)


# --- the report -------------------------------------------------------------------------------------------------


def test_cards_that_fit_and_what_is_left_of_them():
    sizes = [GB]
    facts = memory.report("model", sizes, "bfloat16")
    by_name = {row["name"]: row for row in facts["optimizers"]}
    epi, ours = by_name["EPI as published"], by_name["ours"]
    assert epi["total_bytes"] == (2 + 2 + 13 + 8) * GB and epi["refresh_bytes"] == 8 * GB
    assert epi["fits"] == [40, 80, 141]
    assert epi["left_bytes"] == {"24": -GB, "40": 15 * GB, "80": 55 * GB, "141": 116 * GB}
    assert ours["total_bytes"] == 8.125 * GB + 4 and ours["refresh_bytes"] == 0
    assert ours["fits"] == [24, 40, 80, 141]
    line = next(x for x in memory.format_report(facts).splitlines() if x.startswith("EPI as published *"))
    assert line.split()[4:] == ["13.000", "13.00", "+8.00", "25.00", "-", "15.00", "55.00", "116.00"]


def test_a_model_that_fills_a_card_fits_it():
    n = 24 * GB // 25  # EPI as published takes 2 + 2 + 13 + 8 bytes a parameter
    for elements, cards in ((n, [24, 40, 80, 141]), (n + 1, [40, 80, 141])):
        facts = memory.report("model", [elements], "bfloat16")
        assert [row["fits"] for row in facts["optimizers"] if row["name"] == "EPI as published"] == [cards]


def test_peers_are_named_as_computed(capsys):
    assert command(memory, "--model", "LLAMA-3.2-1b") == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for peer, per in (published.PEER_STATE_BYTES | published.PEER_STATE_BYTES_BFLOAT16).items():
        assert f" {per:.3f} " in lines[f"{peer} *"]
    rounded = {name.split()[0] + name.split()[2][:1]: per for name, per in published.PEER_STATE_BYTES.items()}
    assert rounded == {
        "bitsandbytes8": pytest.approx(2.03, abs=0.005),
        "torchao8": pytest.approx(2.03, abs=0.005),
        "torchao4": pytest.approx(1.06, abs=0.005),
    }
    assert list(published.PEER_STATE_BYTES_BFLOAT16.values()) == [3.125, 6]
    names = totals(memory.report("model", [100], "float32"))
    assert not names.keys() & {
        *published.PEER_STATE_BYTES_BFLOAT16,
        "torch AdamW, float32 master weights and states",
    }


def test_the_readme_shows_what_is_printed(capsys):
    assert command(memory, "--model", "Llama-3-8B") == 0
    table = capsys.readouterr().out.split("\n\na parameter:")[0]
    assert table in (Path(__file__).parents[1] / "README.md").read_text()


def test_json_goes_to_a_file_beside_the_table(tmp_path, capsys):
    out = tmp_path / "memory.json"
    assert command(memory, "--model", "Mistral-7B", "--dtype", "float32", "--json", out) == 0
    facts = json.loads(out.read_text())
    assert facts == memory.report("Mistral-7B", memory.model_sizes("Mistral-7B"), "float32")
    assert "Mistral-7B: 7,241,732,096 parameters in 291 tensors, float32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give a file that can be written"):
        command(memory, "--model", "Mistral-7B", "--json", tmp_path / "missing" / "memory.json")


# --- where the config comes from --------------------------------------------------------------------------------


def test_a_directory_with_a_config_needs_no_weights(tmp_path, monkeypatch):
    tiny_llama(**VOCABULARY).config.save_pretrained(tmp_path / "Llama-3-8B")
    expected = sum(one.numel() for one in tiny_llama(**VOCABULARY).parameters())
    assert sum(memory.model_sizes(str(tmp_path / "Llama-3-8B"))) == expected
    monkeypatch.chdir(tmp_path)
    assert sum(memory.model_sizes("Llama-3-8B")) == expected, "what is here comes before a built-in name"
    assert sum(memory.model_sizes("llama-3-8b")) == PUBLISHED_COUNTS["Llama-3-8B"]


def test_untied_weights_count_twice(tmp_path):
    tied = sum(memory.model_sizes(str(write_config(tmp_path))))
    untied = sum(memory.model_sizes(str(write_config(tmp_path, tie_word_embeddings=False))))
    assert untied - tied == 300 * 32


def test_what_cannot_be_found_says_what_to_do(tmp_path, monkeypatch):
    from transformers import AutoConfig

    def no_network(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'. Check your connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    with pytest.raises(SystemExit, match="couldn't connect.*Give a directory or a config.json.*Llama-3-8B"):
        command(memory, "--model", "nobody/nothing")
    with pytest.raises(SystemExit, match="no such file or directory.*Give a directory"):
        command(memory, "--model", tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be loaded"), ("[]", "model_type"), ('{"model_type": "vit"}', "no causal language model")],
)
def test_configs_that_make_no_model_are_refused(text: str, said: str, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=said):
        command(memory, "--model", path)


ODD = {  # none of it makes a parameter larger or smaller; transformers says some things once a process, hence a number
    "token": lambda i: {"bos_token_id": 128_000 + i},
    "rope": lambda i: {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beyond": i}},
    "labels": lambda i: {"num_labels": 3 + i, "id2label": {"0": "one"}},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_transformers_says_of_odd_configs_is_left_out(odd, tmp_path, capsys, monkeypatch):
    from epi_kernels.finetune import model

    said: list[str] = []
    library = logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(library, "handlers", [handler])
    monkeypatch.setattr(library, "level", library.level)  # put back at the end
    library.setLevel(logging.WARNING)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    sizes = model.sizes_of(model.load_config(str(write_config(tmp_path, **odd(1)))))
    assert said, "the config is odd"
    said.clear()
    assert printed(capsys, "--model", write_config(tmp_path, **odd(2)))["parameters"] == sum(sizes)
    assert said == [] and library.level == logging.WARNING
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    memory.model_sizes(str(write_config(tmp_path, **odd(3))))
    assert said, "asked for"


def test_isolated_rows_add_lines_of_ours(capsys):
    sizes = [4096 * 4096, 4096 * 14336]
    plain, more = (totals(memory.report("", sizes, "bfloat16", share)) for share in (None, 0.9))
    assert plain.items() <= more.items()
    model = 2 * 2 * sum(sizes)  # weights and gradients stay
    for name in ("ours", "ours, 8-bit states"):
        state = more[f"{name}, 90 % of rows isolated"] - model
        assert state == pytest.approx(0.1 * (plain[name] - model), rel=1e-3)
    with pytest.raises(SystemExit):
        command(memory, "--model", "Llama-3-8B", "--isolated-rows", "1.5")
    assert "a number from 0 to 1, not 1.5" in capsys.readouterr().err
