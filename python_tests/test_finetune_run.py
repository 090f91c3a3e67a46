"""`epi-kernels finetune` from arguments to a directory that loads: what it writes and says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epi_kernels.finetune import command as finetune
from epi_kernels.report import command as report
from python_tests.finetune_runs import FAST, arguments, events, same_weights, weights, write_inputs
from python_tests.tiny_model import backend, command, qa, write_config, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def compared(files, tmp_path_factory):
    """A finished run from a config, with everything on."""
    out = tmp_path_factory.mktemp("compared") / "out"
    more = [
        "--retain",
        files / "old.jsonl",
        "--compare",
        "--mask-interval",
        3,
        "--accumulation",
        2,
        "--epochs",
        2,
    ]
    assert command(finetune, *arguments(files, out, *more, model="config-tiny.json")) == 0
    return out


@pytest.mark.parametrize("folder", [".", "adamw", "checkpoints"])
def test_the_result_loads_as_any_other_model(compared, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    directory = compared / folder if folder != "checkpoints" else sorted((compared / folder).iterdir())[-1]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    net = AutoModelForCausalLM.from_pretrained(directory)
    assert tokenizer.chat_template
    assert net.config.eos_token_id == tokenizer.eos_token_id
    saved = weights(directory)
    named = dict(net.named_parameters())
    assert all(torch.equal(named[name], saved[name]) for name in named)
    generate = pipeline("text-generation", model=str(directory))
    answer = generate([{"role": "user", "content": "What is 1 plus 1?"}], max_new_tokens=3, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_the_log_tells_the_run(compared):
    start = events(compared, "start")[0]
    assert start["optimizer"] == "isolation"
    assert start["data"]["train"]["examples"] == 23 and start["data"]["validation"]["examples"] == 1
    steps = events(compared, "step")
    assert [event["step"] for event in steps] == list(range(1, start["steps"] + 1))
    assert all(event["loss"] > 0 and event["grad_norm"] > 0 and event["answer_tokens"] > 0 for event in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    refreshes = events(compared, "refresh")
    assert [event["step"] for event in refreshes] == start["refreshes_due"] == [3, 6, 9, 12]
    for event in refreshes:
        assert event["isolated"] == sum(row["isolated"] for row in event["layers"]) > 0
        assert 0 <= event["jaccard"] <= 1
        assert event["state_bytes"]["total"] > 0
    evals = events(compared, "eval")
    assert (evals[0]["step"], evals[-1]["step"]) == (0, start["steps"])
    end = events(compared, "end")[0]
    assert end["validation_loss"] == evals[-1]["validation_loss"]
    assert (end["retain_loss_before"], end["retain_loss_after"]) == (
        evals[0]["retain_loss"],
        evals[-1]["retain_loss"],
    )


def test_compare_starts_from_the_same_weights_and_data(compared):
    ours, plain = events(compared, "eval"), events(compared / "adamw", "eval")
    assert ours[0]["validation_loss"] == plain[0]["validation_loss"]
    assert ours[0]["retain_loss"] == plain[0]["retain_loss"]
    first, second = events(compared, "step"), events(compared / "adamw", "step")
    assert [(one["tokens"], one["answer_tokens"], one["lr"]) for one in first] == [
        (one["tokens"], one["answer_tokens"], one["lr"]) for one in second
    ]
    assert first[0]["loss"] == second[0]["loss"]
    assert events(compared / "adamw", "refresh") == []
    assert not same_weights(compared, compared / "adamw")


def test_the_table_shows_both_runs(compared, capsys):
    # Resuming a finished run trains nothing and prints the table again.
    assert command(finetune, "--out", compared, "--resume") == 0
    text = capsys.readouterr().out
    row = {line.split()[0]: line.split() for line in text.splitlines() if line}
    end = events(compared, "end")[0]
    assert row["MaskedEMAAdamW"][1] == f"{end['validation_loss']:.4f}"
    assert row["MaskedEMAAdamW"][3] == f"{end['retain_loss_after']:.4f}"
    assert row["torch.optim.AdamW"][2] == row["MaskedEMAAdamW"][2]


def test_planned_bytes_are_the_optimizers(compared):
    start, end = events(compared, "start")[0], events(compared, "end")[0]
    assert end["state_bytes"]["total"] - end["state_bytes"]["other"] == start["memory"]["ours"]
    plain = events(compared / "adamw", "end")[0]["state_bytes"]
    assert plain["total"] - plain["other"] == start["memory"]["adamw"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        more = ["--max-steps", 3, "--seed", seed, "--mask-interval", 2]
        assert command(finetune, *arguments(files, tmp_path / name, *more)) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")
    assert not list((tmp_path / "a").rglob("*partial*"))


def test_gradient_checkpointing_recomputes_and_changes_nothing(files, tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    calls = []
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    counts = []
    for name, more in (("a", []), ("b", ["--gradient-checkpointing"])):
        assert command(finetune, *arguments(files, tmp_path / name, "--max-steps", 3, *more)) == 0
        counts.append(len(calls))
        calls.clear()
    assert counts[1] == counts[0] + 3 * 2  # each of 3 steps runs each of 2 layers once more
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_accumulated_batches_weigh_answer_tokens_alike(files, tmp_path):
    """One batch of four rows and four batches of one row: the same loss and the same gradient norm, up to rounding."""
    common = ["--no-packing", "--max-steps", 2]
    assert command(finetune, *arguments(files, tmp_path / "a", *common, "--batch-size", 4)) == 0
    assert (
        command(finetune, *arguments(files, tmp_path / "b", *common, "--batch-size", 1, "--accumulation", 4))
        == 0
    )
    for first, second in zip(events(tmp_path / "a", "step"), events(tmp_path / "b", "step"), strict=True):
        assert first["answer_tokens"] == second["answer_tokens"]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


def test_bf16_weights_and_states(files, tmp_path):
    out = tmp_path / "out"
    more = ["--dtype", "bf16", "--max-steps", 4, "--mask-interval", 2]
    assert command(finetune, *arguments(files, out, *more)) == 0
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    start, end = events(out, "start")[0], events(out, "end")[0]
    assert end["state_bytes"]["total"] - end["state_bytes"]["other"] == start["memory"]["ours"]
    assert start["memory"]["ours"] / start["parameters"] == pytest.approx(4.125, abs=0.01)


ISOLATION = [
    ["--scope", "layer", "--layer-key", "block", "--hysteresis", "0.2"],
    ["--normalization", "zscore", "--importance-beta", "0.9", "--importance-dtype", "bf16"],
    ["--normalization", "none", "--state-dtype", "bf16", "--no-stochastic-rounding", "--mask-warmup", "1"],
    ["--isolation-ratio", "0"],
    ["--backend", "reference", "--isolation-ratio", "0.3"],
]


@pytest.mark.parametrize("options", ISOLATION, ids=lambda options: options[0] + options[1])
def test_isolation_options_reach_the_optimizer(files, tmp_path, options):
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, "--max-steps", 3, "--mask-interval", 2, *options)) == 0
    refreshes = events(out, "refresh")
    start, end = events(out, "start")[0], events(out, "end")[0]
    assert [event["step"] for event in refreshes] == start["refreshes_due"]
    assert end["state_bytes"]["total"] - end["state_bytes"]["other"] == start["memory"]["ours"]
    if "--layer-key" in options:
        names = {row["name"] for row in refreshes[0]["layers"]}
        assert {"model.layers.0", "model.layers.1", "model.embed_tokens.weight"} <= names
        assert isinstance(refreshes[0]["threshold"], dict)
    if "0.3" in options:
        assert refreshes[-1]["isolated"] / start["parameters"] == pytest.approx(0.3, abs=0.01)


def test_one_example_trains_without_validation(files, tmp_path, capsys):
    data = write_jsonl(tmp_path / "one.jsonl", qa(1))
    out = tmp_path / "out"
    assert command(finetune, "--model", files / "model", "--data", data, "--out", out, *FAST) == 0
    assert "no validation" in capsys.readouterr().out
    assert events(out, "eval")[-1]["validation_loss"] is None
    assert json.loads((out / "done.json").read_text())["step"] == 1


def test_raw_pairs_beside_old_data_in_another_form(files, tmp_path):
    """Pairs joined as they stand need no chat template; the old data, in Alpaca's form, does."""
    out = tmp_path / "out"
    more = ["--template", "raw", "--max-steps", 1]
    assert command(finetune, *arguments(files, out, *more)) == 0
    assert not (out / "chat_template.jinja").exists()
    out = tmp_path / "retain"
    assert command(finetune, *arguments(files, out, *more, "--retain", files / "old.jsonl")) == 0
    assert events(out, "eval")[0]["retain_loss"] > 0
    assert (out / "chat_template.jinja").exists()


def make_qa(out, *more, seed="0"):
    tool = Path(__file__).resolve().parents[1] / "tools" / "make_stdlib_qa.py"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run(
        [sys.executable, tool, out, *more], check=True, capture_output=True, env=environment, timeout=120
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_real_text_from_the_standard_library(tmp_path, capsys):
    """The documentation of Python itself: more than a thousand pairs, the same ones each time; a run on a few."""
    every = make_qa(tmp_path / "all.jsonl")
    assert len(every) > 1000 and len({pair["prompt"] for pair in every}) == len(every)
    assert make_qa(tmp_path / "again.jsonl", seed="77") == every
    few = make_qa(tmp_path / "few.jsonl", "--limit", "60")
    assert len(few) == 60 and all(pair in every for pair in few)
    write_config(tmp_path, vocab_size=600)
    more = ["--max-length", 96, "--batch-size", 4, "--epochs", 4, "--lr", 1e-2, "--mask-interval", 5]
    data = ["--data", tmp_path / "few.jsonl", "--out", tmp_path / "out", "--backend", backend(), "--quiet"]
    assert command(finetune, "--model", tmp_path / "config-tiny.json", *data, *more) == 0
    evals = events(tmp_path / "out", "eval")
    assert evals[-1]["validation_loss"] < 0.9 * evals[0]["validation_loss"]
    assert events(tmp_path / "out", "refresh")


def test_adaptive_options_reach_the_optimizer_and_the_log(files, tmp_path):
    out = tmp_path / "out"
    more = ["--max-steps", 9, "--mask-interval", 1, "--adaptive-interval", 1, 3, "--hysteresis", 0.5]
    more += ["--isolation-ratio", 0.1, "--adaptive-ratio", 0.05, 0.15, "--beta2", 0.99]
    assert command(finetune, *arguments(files, out, *more)) == 0
    refreshes, start = events(out, "refresh"), events(out, "start")[0]
    assert start["refreshes_due"] == [1]  # the masks said when the others came
    steps = [event["step"] for event in refreshes]
    assert [later - step for step, later in itertools.pairwise(steps)] == [
        event["interval"] for event in refreshes[:-1]
    ]
    assert {event["interval"] for event in refreshes} <= {1, 2, 3}
    assert all(0.05 <= event["ratio"] <= 0.15 for event in refreshes)
    for event in refreshes:
        assert event["isolated"] / start["parameters"] == pytest.approx(event["ratio"], abs=0.01)
    assert len({(event["interval"], event["ratio"]) for event in refreshes}) > 1
    page = tmp_path / "page.html"
    assert command(report, out, "--out", page) == 0
    assert "isolation ratio 0.05 to 0.15, refreshed every 1 to 3 steps" in page.read_text()
