"""What `epi-kernels finetune` says before it begins, and what it refuses before it writes anything."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import epi_kernels.backends
from epi_kernels.files import held
from epi_kernels.finetune import command as finetune
from epi_kernels.finetune import plan
from epi_kernels.finetune.options import Options
from python_tests.finetune_runs import FAST, arguments, weights, write_inputs
from python_tests.tiny_model import command, tiny_llama, tiny_tokenizer, write_config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


def test_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--dry-run", "--epochs", 5, "--mask-interval", 4, "--isolation-ratio", 0.01]
    assert command(finetune, *arguments(files, out, *more, model="config-tiny.json")) == 0
    assert not out.exists()
    text = capsys.readouterr().out
    per_parameter = {
        line.rsplit(None, 1)[0]: line.rsplit(None, 1)[1] for line in text.splitlines() if line.strip()
    }
    ours = next(value for line, value in per_parameter.items() if line.startswith("optimizer state"))
    assert float(ours) == pytest.approx(8.125, abs=0.001)
    assert "beside torch AdamW's" in text and "8.000" in text
    assert "beside EPI's as published" in text and "13.000" in text
    assert "refreshes of the mask due: " in text and "host memory" not in text
    assert command(finetune, *arguments(files, out, *more, "--offload", "cpu", model="config-tiny.json")) == 0
    assert "optimizer state, this run (host memory)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, steps, due",
    [
        ({}, 99, []),
        ({}, 100, [100]),
        ({"mask_interval": 10}, 35, [10, 20, 30]),
        ({"mask_interval": 10, "mask_warmup": 3}, 24, [3, 13, 23]),
        ({"protect": "imp"}, 150, [0, 100]),
        ({"isolation_ratio": 0.0}, 500, []),
        ({"adaptive_interval": [50, 200]}, 500, [100]),  # the masks say when the next ones come
    ],
)
def test_refreshes_due_are_counted_as_the_optimizer_counts(options, steps, due):
    assert plan.refreshes(Options(**options), steps) == due


@pytest.mark.parametrize(
    "more, warned",
    [
        ([], True),
        (["--mask-interval", 2], False),
        (["--mask-interval", 3], True),
        (["--isolation-ratio", 0], False),
    ],
)
def test_a_run_without_any_isolation_warns_at_the_start(files, tmp_path, capsys, more, warned):
    assert command(finetune, *arguments(files, tmp_path / "out", "--max-steps", 3, "--dry-run", *more)) == 0
    assert ("nothing will be isolated" in capsys.readouterr().err) is warned


@pytest.fixture
def refused(capsys):
    """Runs the command, which must refuse with status 2, and returns what it said."""

    def check(*arguments, status=2):
        assert command(finetune, *arguments) == status
        return capsys.readouterr().err

    return check


def test_everything_is_checked_before_anything_is_written(files, tmp_path, refused):
    out = tmp_path / "out"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    (tmp_path / "no_type.json").write_text("{}")
    (tmp_path / "bert.json").write_text('{"model_type": "bert", "is_decoder": true}')
    other = tiny_tokenizer(["completely different words " * 9] * 3, 400)
    other.add_tokens([f"<extra{n}>" for n in range(400 - len(other))])
    other.save_pretrained(tmp_path / "big")
    assert "holds no examples" in refused("--model", files / "model", "--data", empty, "--out", out)
    assert "no such file" in refused(
        "--model", tmp_path / "nowhere", "--data", files / "qa.jsonl", "--out", out
    )
    assert "model_type" in refused(
        "--model", tmp_path / "no_type.json", "--data", files / "qa.jsonl", "--out", out
    )
    assert "--out is required" in refused("--model", files / "model", "--data", files / "qa.jsonl")
    assert "more than the model's 128" in refused(*arguments(files, out, "--max-length", 200))
    assert "no example has an answer within 5 tokens" in refused(*arguments(files, out, "--max-length", 5))
    assert "they do not belong together" in refused(*arguments(files, out, "--tokenizer", tmp_path / "big"))
    assert "--isolation-ratio is 1.0; allowed" in refused(*arguments(files, out, "--isolation-ratio", 1))
    assert "--mask-interval is 0; allowed" in refused(*arguments(files, out, "--mask-interval", 0))
    for given, said in (
        (
            ["--adaptive-interval", 101, 200],
            "[101, 200]; allowed: MIN and MAX above 0, with --mask-interval (100)",
        ),
        (["--adaptive-ratio", 0.001, 1], "MIN and MAX above 0 and below 1, with --isolation-ratio (0.01)"),
        (["--adaptive-ratio", 0, 0.5], "--adaptive-ratio is [0.0, 0.5]; allowed"),
    ):
        assert said in refused(*arguments(files, out, *given))
    assert "not with --normalization zscore" in refused(
        *arguments(files, out, "--hysteresis", 0.1, "--normalization", "zscore")
    )
    assert "not with --fsdp" in refused(*arguments(files, out, "--offload", "cpu", "--fsdp"))
    for own in ([], ["--importance-beta", 0.999]):  # beta2: shared
        assert "give --importance-beta other than --beta2 (0.999)" in refused(
            *arguments(files, out, "--importance-dtype", "int8", *own)
        )
    assert "protects nothing" in refused(*arguments(files, out, "--protect", "x", "--isolation-ratio", 0))
    assert "no such file" in refused(*arguments(files, out, "--protect", tmp_path / "none"))
    assert "holds no checkpoint" in refused(*arguments(files, out, "--protect", files))
    if not torch.cuda.is_available():
        assert "sees no CUDA" in refused(*arguments(files, out, "--device", "cuda"))
    assert "--seed is 9223372036854775808; allowed" in refused(*arguments(files, out, "--seed", 1 << 63))
    assert "qa.jsonl is a file" in refused(*arguments(files, files / "qa.jsonl" / "out"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": "many"}, "cannot be loaded"),
        ({"hidden_size": 30}, "cannot be loaded"),
        ({"hidden_size": 0}, "its config makes no Llama"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(tmp_path, files, refused, change, said):
    config = write_config(tmp_path, **change)
    text = refused("--model", config, "--data", files / "qa.jsonl", "--out", tmp_path / "out", *FAST)
    assert said in text
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_half_its_weights_is_refused(tmp_path, files, refused):
    shutil.copytree(files / "model", tmp_path / "half")
    os.truncate(tmp_path / "half" / "model.safetensors", 1000)
    text = refused(
        "--model", tmp_path / "half", "--data", files / "qa.jsonl", "--out", tmp_path / "out", *FAST
    )
    assert "half: cannot be loaded" in text
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_said(tmp_path, files, refused, monkeypatch):
    mkdir = Path.mkdir

    def denied(self, *arguments, **options):
        if self.name == "out":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", denied)
    said = refused(*arguments(files, tmp_path / "out", "--max-steps", 1))
    assert "out: cannot be made (Permission denied)" in said


def test_a_mistyped_directory_is_said_before_the_hub_is_asked(files, tmp_path, refused, monkeypatch):
    from transformers import AutoConfig

    def offline(name):
        raise OSError(
            f"We couldn't connect to the hub to load {name}. Check your connection.\nSee the manual."
        )

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    said = refused("--model", "nodir", "--data", files / "qa.jsonl", "--out", tmp_path / "out").splitlines()
    assert said == [
        "--model nodir: no such directory; trying the hub",
        "epi-kernels finetune: --model nodir: no such directory here, and the hub gave none "
        "(We couldn't connect to the hub to load nodir)",
    ]


def test_a_dry_run_refuses_what_the_run_refuses(files, tmp_path, refused):
    out = tmp_path / "out"
    dry = ["--dry-run", "--max-steps", 2]
    assert "no such file" in refused(*arguments(files, out, *dry, "--protect", tmp_path / "none"))
    assert "holds no checkpoint" in refused(*arguments(files, out, *dry, "--protect", files))
    for name, usable, _ in epi_kernels.backends.available():
        if not usable:
            assert "not able to run" in refused(*arguments(files, out, *dry, "--backend", name))
    with pytest.raises(SystemExit):
        refused(*arguments(files, out, *dry, "--state-dtype", "fp8"))
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "is not empty: choose another" in refused(*arguments(files, out, *dry))


def test_an_output_directory_with_something_in_it_is_refused(files, tmp_path, refused):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "is not empty: choose another" in refused(*arguments(files, out))
    assert "not a fine-tuning run" in refused(*arguments(files, out, "--overwrite"))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert "no run to resume" in refused("--out", out, "--resume")
    assert "is a file" in refused(*arguments(files, out / "thesis.txt"))


def test_overwrite_replaces_a_run_but_never_its_own_input(files, tmp_path, refused):
    out = tmp_path / "out"
    assert command(finetune, *arguments(files, out, "--max-steps", 2)) == 0
    before = weights(out)
    assert "--resume continues it, --overwrite replaces it" in refused(*arguments(files, out))
    text = refused("--model", out, "--data", files / "qa.jsonl", "--out", out, *FAST, "--overwrite")
    assert "--overwrite would delete --model" in text
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    assert command(finetune, *arguments(files, out, "--max-steps", 3, "--overwrite")) == 0
    assert json.loads((out / "done.json").read_text())["step"] == 3


def test_overwrite_through_a_link_keeps_the_link(files, tmp_path):
    real, out = tmp_path / "real", tmp_path / "out"
    assert command(finetune, *arguments(files, real, "--max-steps", 1)) == 0
    out.symlink_to(real)
    assert command(finetune, *arguments(files, out, "--max-steps", 2, "--overwrite")) == 0
    assert out.is_symlink() and json.loads((real / "done.json").read_text())["step"] == 2
    assert [path.name for path in (real / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_loss_that_is_no_number_stops_the_run(files, tmp_path, refused):
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    more = [
        "--model",
        tmp_path / "broken",
        "--data",
        files / "qa.jsonl",
        "--out",
        tmp_path / "out",
        *FAST,
        "--no-packing",
    ]
    assert "step 1: loss nan" in refused(*more, status=1)


@pytest.mark.parametrize("how", [[], ["--overwrite"], ["--resume"]])
def test_two_processes_do_not_train_in_one_directory(tmp_path, files, refused, how):
    out = tmp_path / "out"
    if how:
        assert command(finetune, *arguments(files, out, "--max-steps", 1)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with held(out):
        said = refused("--out", out, *how) if how == ["--resume"] else refused(*arguments(files, out, *how))
    assert "another process is training there" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert out.exists() == bool(how)
