"""`epi-kernels memory --card` and `finetune --fit`: what fits, and that its bytes are those of the real thing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from epi_kernels import memory
from epi_kernels.finetune import command as finetune
from epi_kernels.finetune.model import sizes_of
from epi_kernels.planner import activations, machine, plans
from epi_kernels.planner import command as command_
from epi_kernels.planner.machine import Machine
from python_tests.finetune_runs import arguments, same_weights, write_inputs
from python_tests.tiny_model import command, write_config

RATES = Machine("a card", memory=1e12, compute=6e13, link=2e10, host=5e10)
SIZES = [1 << 22] * 200
WEIGHTS = 2 * sum(SIZES)


def passes(checkpointing: bool, release: bool) -> int:
    """Half a gigabyte of activations without checkpointing, a tenth of that with it."""
    return WEIGHTS + (0 if release else WEIGHTS) + (50_000_000 if checkpointing else 500_000_000)


def found(card: float, *more, sizes=SIZES) -> list[plans.Plan]:
    return plans.plans(sizes, passes, plans.Job(card, 1, 2048, *more), RATES)


# --- bytes of the passes ----------------------------------------------------------------------------------------

MEASURED = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from bench.bench_memory import peak_mib
from python_tests.test_planner import WIDE
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE), dtype=torch.bfloat16, attn_implementation="sdpa")
tokens = torch.zeros(4, 512, dtype=torch.long)
train = lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
train(tokens[:, :8])  # what is loaded at the first use
model.zero_grad()
print(peak_mib(lambda: train(tokens)))
"""
WIDE = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def config_of(**fields):
    from transformers import AutoConfig

    return AutoConfig.for_model(**WIDE | fields)


def peak(config, **options) -> int:
    common = {"batch": 4, "length": 512, "dtype": torch.bfloat16, "checkpointing": False, "release": False}
    return activations.peak_bytes(config, **common | options)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is read from /proc")
def test_the_counted_passes_are_those_of_a_process():
    process = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    config = config_of()
    counted = (peak(config) - 2 * sum(sizes_of(config))) / 2**20
    measured = float(process.stdout.split()[-1])
    assert counted == pytest.approx(measured, rel=0.15), "beyond the weights, in MiB"


def test_checkpointing_and_release_take_less_and_more_tokens_more():
    config = config_of(vocab_size=512, num_hidden_layers=8)
    whole, checkpointed = peak(config), peak(config, checkpointing=True)
    assert checkpointed < whole
    released = peak(config, checkpointing=True, release=True)
    gradients = 2 * sum(sizes_of(config))
    assert checkpointed - gradients <= released < checkpointed
    assert peak(config, batch=8) > whole


def test_a_model_that_cannot_be_counted_is_refused():
    from epi_kernels.finetune.errors import UserError

    with pytest.raises(UserError, match="cannot be counted"):
        peak(config_of(num_key_value_heads=3))


# --- the choice -------------------------------------------------------------------------------------------------


def test_a_large_card_gets_the_most_exact_and_a_small_one_what_fits():
    large = plans.choose(found(100))
    assert large is not None and large.configuration is plans.CONFIGURATIONS[0]
    chosen = [plans.choose(found(card)) for card in (12, 5.5, 4.6, 3.8, 3.1)]
    assert all(plan is not None and plan.fits for plan in chosen)
    assert [plan.configuration.offloaded for plan in chosen if plan] == [False] * 4 + [True]
    assert chosen[-1].host_bytes > 0 and chosen[-1].host_gbps_to_hide > 0
    assert plans.choose(found(2.9)) is None


def test_states_count_on_the_card_or_on_the_host():
    for plan in found(100):
        one = plan.configuration
        options = {name: value for name, value in one.options.items() if name != "offload"}
        kinds = plans.footprint.masked_ema_adamw(SIZES, torch.bfloat16, **options)
        state, counters = kinds["total"], kinds["other"]  # which are not pinned
        beside = plans.STAGING_BYTES // 2 if one.offloaded else state
        on_card = plans.RESERVED + passes(one.checkpointing, one.release) + beside
        assert plan.device_bytes == on_card
        assert plan.host_bytes == (state - counters + plans.STAGING_BYTES if one.offloaded else 0)


def test_accumulation_keeps_gradients_released_or_not():
    """Beside them a pass holds one at a time, and only the last pass hides an update."""
    for once, often in zip(found(100), found(100, 4), strict=True):
        one = once.configuration
        released = passes(one.checkpointing, True) - passes(one.checkpointing, one.release)
        assert often.device_bytes - once.device_bytes == WEIGHTS + released
        assert often.passes_seconds == pytest.approx(4 * once.passes_seconds)
        assert often.update_seconds == once.update_seconds
    tight = 3.1
    assert any(plan.fits for plan in found(tight)) and not any(plan.fits for plan in found(tight, 4))
    assert "no accumulation (now 4" in plans.Job(tight, 1, 2048, 4).nothing_fits()


def test_what_the_options_add_to_the_states_is_counted():
    own = {"importance_beta": 0.9, "importance_dtype": torch.float32, "persistent_masks": True}
    more = {plan.configuration.name: plan for plan in found(100, 1, own) if plan.configuration.release}
    for plan in found(100):
        name, added = plan.configuration.name, 4 * sum(SIZES) + sum(SIZES) // 8
        if plan.configuration.options.get("state_dtype") == "int4":
            assert name not in more, "which has no importance of its own"
        elif plan.configuration.release and not plan.configuration.checkpointing:
            released = next(p for p in found(100, 1, own) if p.configuration is plan.configuration)
            grown = (released.device_bytes - plan.device_bytes, released.host_bytes - plan.host_bytes)
            assert grown == ((0, added) if plan.configuration.offloaded else (added, 0))


def test_pinned_memory_comes_in_powers_of_two():
    n = (1 << 22) + 64
    larger = [plan for plan in found(100, sizes=[n] * 200) if plan.configuration.offloaded]
    for plan, before in zip(larger, [p for p in found(100) if p.configuration.offloaded], strict=True):
        assert plan.host_bytes == pytest.approx(2 * before.host_bytes - plans.STAGING_BYTES, rel=1e-6)


def test_passes_are_not_counted_where_states_alone_do_not_fit():
    def never(checkpointing, release):
        raise AssertionError("counted in vain")

    small = plans.plans(SIZES, never, plans.Job(1, 1, 2048), RATES)
    assert all(plan.at_least and not plan.fits for plan in small)


def test_a_slow_host_sticks_out_and_a_fast_one_is_hidden():
    slow = plans.plans(SIZES, passes, plans.Job(100, 1, 2048), RATES)[-1]
    fast = plans.plans(
        SIZES, passes, plans.Job(100, 1, 2048), Machine("a card", 1e12, 6e13, link=1e13, host=1e13)
    )[-1]
    assert slow.configuration.offloaded and slow.update_seconds > 0
    assert fast.host_gbps_to_hide and fast.host_gbps_to_hide == slow.host_gbps_to_hide
    narrow = Machine("a card", 1e12, 6e13, link=1e9, host=1e13)
    (held_up,) = plans.plans(SIZES, passes, plans.Job(100, 1, 2048), narrow, plans.CONFIGURATIONS[-1:])
    assert held_up.host_gbps_to_hide is None and held_up.update_seconds > 0
    text = command_.verdict(held_up, plans.Job(100, 1, 2048), narrow)
    assert "copies alone take longer than the backward pass" in text and plans.UNROUNDED in text
    assert fast.update_seconds == 0 and fast.seconds == fast.passes_seconds == slow.passes_seconds


@pytest.mark.parametrize(("gigabytes", "size"), [(24, 24), (23.9, 16), (8, 16), (100, 80), (500, 141)])
def test_rates_are_those_of_the_next_smaller_card(gigabytes, size):
    assert machine.card_of(gigabytes) is machine.CARDS[size]


# --- the commands -----------------------------------------------------------------------------------------------

RATES_GIVEN = ("--card-gbps", 1000, "--card-tflops", 100, "--link-gbps", 25, "--host-gbps", 60)


def test_memory_card_names_the_configuration_and_what_it_needs(capsys, tmp_path):
    config = write_config(tmp_path)
    given = ("--model", config, "--card", 24, "--max-length", 64, *RATES_GIVEN)
    assert command(memory, *given, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["plans"]) == len(plans.CONFIGURATIONS) and facts["chosen"] == 0
    assert facts["plans"][0]["fits"] and facts["rates"]["host"] == 60e9
    assert command(memory, *given) == 0
    text = capsys.readouterr().out
    assert (
        "-> 32-bit weights, bfloat16 states" in text
        and "MaskedEMAAdamW(model.named_parameters(), master_weight_bits=32)" in text
    )
    assert command(memory, "--model", config, "--card", 0.9, "--max-length", 64, *RATES_GIVEN) == 0
    assert "Nothing fits: give a larger card" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (("--card", 0), "--card is 0"),
        (("--card", "inf"), "--card is inf"),
        (("--host-gbps", 60, "--batch-size", 2), "--batch-size, --host-gbps plans for a card: give --card"),
        (("--card", 24, "--host-gbps", -1), "--host-gbps is -1"),
        (("--card", 24, "--dtype", "float32"), "bfloat16"),
    ],
)
def test_memory_card_refuses_what_cannot_be(tmp_path, bad, words):
    with pytest.raises(SystemExit, match=words):
        command(memory, "--model", write_config(tmp_path), *bad)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("fit"))


def test_finetune_fits_itself_and_a_resume_stays_as_it_was(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, "--fit", 24, "--max-steps", 2)) == 0
    assert "--fit 24: 32-bit weights, bfloat16 states" in capsys.readouterr().out
    options = json.loads((out / "run.json").read_text())["options"]
    assert (options["dtype"], options["master_weight_bits"], options["gradient_release"]) == (
        "bf16",
        32,
        False,
    )
    by_hand = tmp_path / "by_hand"
    assert (
        command(
            finetune,
            *arguments(files, by_hand, "--dtype", "bf16", "--master-weight-bits", 32, "--max-steps", 2),
        )
        == 0
    )
    assert same_weights(out, by_hand)
    assert command(finetune, "--out", out, "--resume") == 0


def test_finetune_fits_what_the_run_keeps(files, monkeypatch):
    """Gradients from pass to pass, an importance of its own and masks of cores: in the job that is planned."""
    from epi_kernels.finetune import fit, options, plan

    jobs = []
    monkeypatch.setattr(fit, "find_plans", lambda config, sizes, job, *_, **__: jobs.append(job) or [])
    more = {"accumulation": 8, "importance_beta": 0.9, "importance_dtype": "int8", "freeze": ["core"]}
    asked = options.Options(model=str(files / "model"), data="data", out="out", fit=24, **more)
    with pytest.raises(fit.UserError, match="no accumulation"):
        fit.fitted(asked)
    (job,) = jobs
    assert job.accumulation == 8
    tensors = [torch.nn.Parameter(torch.empty(n)) for n in (7, 9)]
    released = [options.Options(gradient_release=True, accumulation=passes) for passes in (1, 8)]
    assert [plan.memory(tensors, torch.float32, one).gradients for one in released] == [36, 64]
    counted = plans.footprint.tensors(1 << 20, torch.bfloat16, **job.options)
    assert sum(counted["importance"]) == (1 << 20) + (1 << 14) and counted["persistent_mask"] == (1 << 17,)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_released_gradients_give_the_same_bits(files, tmp_path, accumulation):
    more = ("--max-grad-norm", 0, "--max-steps", 4, "--mask-interval", 2, "--accumulation", accumulation)
    for name, flags in (("whole", ()), ("released", ("--gradient-release",))):
        assert command(finetune, *arguments(files, tmp_path / name, *more, *flags)) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "released")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fit", 24, "--state-dtype", "int8"), "--fit decides --state-dtype"),
        (("--fit", 0), "--fit is 0"),
        (("--fit", 0.9), "Nothing fits"),
        (("--fit", 24, "--fsdp"), "leave out --fsdp"),
        (("--fit", 24, "--attention", "eager"), "--attention sdpa"),
        (("--gradient-release",), "--max-grad-norm 1"),
        (("--gradient-release", "--max-grad-norm", 0, "--compare"), "--compare"),
    ],
)
def test_finetune_refuses_what_does_not_go_together(files, tmp_path, flags, words, capsys):
    assert command(finetune, *arguments(files, tmp_path / "out", *flags)) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
