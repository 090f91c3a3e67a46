"""`epi-kernels isolate` from probe runs to a fused model: what it writes, says and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from epi_kernels import cli
from epi_kernels.isolation import CoreFile, find_core, fuse
from epi_kernels.isolation import command as isolate
from epi_kernels.isolation import core as core_module
from epi_kernels.isolation.core_file import union_mask
from python_tests.tiny_model import save_tiny

RUNS = {"sums": 1, "words": 2, "more": 3}


def run(*arguments: object) -> int:
    return cli.main(["isolate", *map(str, arguments)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, three runs of it (two of which moved the same weights), their cores."""
    folder = tmp_path_factory.mktemp("files")
    base = save_tiny(folder / "base")
    weights = load_file(base / "model.safetensors")
    for name, seed in RUNS.items():
        shutil.copytree(base, folder / name)
        rng = torch.Generator().manual_seed(min(seed, 2))  # words and more: alike
        moved = {key: one + torch.randn(one.shape, generator=rng) * 0.1 for key, one in weights.items()}
        if name == "more":
            moved = {key: weights[key] + 1.5 * (one - weights[key]) for key, one in moved.items()}
        save_file(moved, folder / name / "model.safetensors", {"format": "pt"})
        out = folder / f"{name}.core"
        assert run("core", "--base", base, "--tuned", folder / name, "--ratio", 0.05, "--out", out) == 0
    return folder


def cores(files):
    return [files / f"{name}.core" for name in RUNS]


def test_core_is_what_python_gives(files, tmp_path, capsys):
    arguments = ["core", "--base", files / "base", "--tuned", files / "sums", "--ratio", 0.05]
    assert run(*arguments, "--out", tmp_path / "core") == 0
    text = capsys.readouterr().out
    found, expected = CoreFile(tmp_path / "core"), find_core(files / "base", files / "sums", 0.05)
    count = 0
    for name in expected.shapes:
        assert torch.equal(union_mask([found], name), union_mask([expected], name))
        count += int(union_mask([found], name).sum())
    elements = sum(one.numel() for one in load_file(files / "base" / "model.safetensors").values())
    assert f"core: {count} of {elements} weights" in text and f"asked for: {int(0.05 * elements)}" in text
    assert found.metadata["tuned"] == "sums"
    # A single safetensors file will do.
    one = ["--tuned", files / "sums" / "model.safetensors", "--out", tmp_path / "again"]
    assert run("core", "--base", files / "base" / "model.safetensors", *one, "--ratio", 0.05) == 0
    assert load_file(tmp_path / "again").keys() == load_file(tmp_path / "core").keys()


def test_a_run_that_moved_little_is_said_so(files, tmp_path, capsys):
    base = ["core", "--base", files / "base"]
    assert run(*base, "--tuned", files / "base", "--out", tmp_path / "none") == 0
    assert "only 0 weights moved at all" in capsys.readouterr().err
    assert run(*base, "--tuned", files / "sums", "--ratio", 0, "--out", tmp_path / "zero") == 0
    assert "less than one weight" in capsys.readouterr().err


def test_groups_are_printed_with_their_stages(files, tmp_path, capsys):
    arguments = ["groups", *cores(files), "--order", "largest", "--json", tmp_path / "groups.json"]
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "groups.json").read_text())
    assert record["groups"] == [[1, 2], [0]]
    assert record["stages"] == [{"tasks": [1, 2], "frozen": []}, {"tasks": [0], "frozen": [1, 2]}]
    similarity = record["similarity"]
    assert similarity[1][2] > 0.9 and similarity[0][1] < 0.1
    assert lines[2].split() == ["sums", *(f"{value:.4f}" for value in similarity[0]), str(record["sizes"][0])]
    assert [line.split() for line in lines[-2:]] == [
        ["1", "words,", "more", "-"],
        ["2", "sums", "words,", "more"],
    ]
    assert run(*arguments, "--frozen", "all") == 0
    assert json.loads((tmp_path / "groups.json").read_text())["stages"][0]["frozen"] == [1, 2, 0]
    assert run(*arguments, "--tau", 0) == 0
    assert json.loads((tmp_path / "groups.json").read_text())["groups"] == [[0, 1, 2]]
    assert run(*arguments, "--frozen", "all", "--single-stage") == 0
    assert len(json.loads((tmp_path / "groups.json").read_text())["stages"]) == 1
    easiest = ["--order", "curriculum", "--difficulty", 0.1, 3, 1]
    assert run("groups", *cores(files), *easiest, "--json", tmp_path / "groups.json") == 0
    assert json.loads((tmp_path / "groups.json").read_text())["groups"] == [[0], [1, 2]]
    assert run("groups", *cores(files), "--order", "frozen", "--seed", 3) == 0


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_fuse_is_what_python_gives(files, tmp_path, capsys, method):
    out = tmp_path / "out"
    tuned = [files / name for name in RUNS]
    options = ["--method", method, "--omega", 0.4, "--max-shard-size", "0.05MB", "--out", out]
    assert run("fuse", "--base", files / "words", "--tuned", *tuned, "--core", *cores(files), *options) == 0
    captured = capsys.readouterr()
    expected, report = fuse(files / "words", tuned, cores(files), method=method, omega=0.4)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    written = {name: one for file in set(index.values()) for name, one in load_file(out / file).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert f"fused: {report.core_elements} of {report.elements} weights from cores" in captured.out
    assert captured.err == ""
    wrong = [files / "sums.core", files / "more.core", files / "words.core"]
    again = ["--out", tmp_path / "again"]
    assert run("fuse", "--base", files / "words", "--tuned", *tuned, "--core", *wrong, *again) == 0
    assert "was taken from 'more' and is used for 'words'" in capsys.readouterr().err


def refused(capsys, *arguments, status: int = 2) -> str:
    assert run(*arguments) == status
    text = capsys.readouterr().err
    assert text.startswith(f"epi-kernels isolate {arguments[0]}: ") and "Traceback" not in text
    assert text.count("\n") == 1
    return text


def test_refusals_are_one_line_and_lose_nothing(files, tmp_path, capsys):
    wide = save_tiny(tmp_path / "wide", hidden_size=64)
    capsys.readouterr()  # transformers' progress bars
    out = tmp_path / "out"
    core = ["core", "--base", files / "base", "--tuned"]
    assert "of another architecture" in refused(capsys, *core, wide, "--out", out)
    assert "no such file" in refused(capsys, *core, tmp_path / "nowhere", "--out", out)
    assert "ratio is 1.5" in refused(capsys, *core, files / "sums", "--out", out, "--ratio", 1.5)
    assert "is a directory" in refused(capsys, *core, files / "sums", "--out", tmp_path)
    assert "does not exist" in refused(capsys, *core, files / "sums", "--out", tmp_path / "no" / "core")
    out.write_bytes(b"precious")
    assert "--overwrite replaces it" in refused(capsys, *core, files / "sums", "--out", out)
    one = files / "sums" / "model.safetensors"
    assert "made from" in refused(capsys, *core, one, "--out", one, "--overwrite")
    inside = files / "base" / "model.safetensors"  # of a checkpoint that is named by its directory
    assert "made from" in refused(capsys, *core, files / "sums", "--out", inside, "--overwrite")
    assert out.read_bytes() == b"precious" and load_file(one) and load_file(inside)

    assert "not a whole safetensors file" in refused(capsys, "groups", out)
    assert "not a core region" in refused(capsys, "groups", one)
    assert "base: is a directory, not" in refused(capsys, "groups", files / "base")
    assert "allowed: 0 to 1" in refused(capsys, "groups", *cores(files), "--tau", 2)
    assert "2 values for 3 cores" in refused(capsys, "groups", *cores(files), "--difficulty", 1, 2)
    assert "no earlier groups" in refused(capsys, "groups", *cores(files), "--single-stage")
    assert "is a directory" in refused(capsys, "groups", *cores(files), "--json", tmp_path)
    assert "made from" in refused(capsys, "groups", *cores(files), "--json", cores(files)[1])
    assert CoreFile(cores(files)[1])
    assert run("core", "--base", wide, "--tuned", wide, "--out", tmp_path / "wide.core") == 0
    capsys.readouterr()
    assert "another architecture" in refused(capsys, "groups", *cores(files), tmp_path / "wide.core")

    fuse_ = ["fuse", "--base", files / "base", "--out", tmp_path / "fused", "--tuned"]
    assert "of another architecture" in refused(capsys, *fuse_, files / "sums", wide)
    assert "need 2 cores" in refused(
        capsys, *fuse_, files / "sums", files / "words", "--core", cores(files)[0]
    )
    wrong = ["--core", tmp_path / "wide.core"]
    assert run(*fuse_, files / "sums", *wrong) == 2
    assert "another architecture" in capsys.readouterr().err
    assert "omega is 2" in refused(capsys, *fuse_, files / "sums", "--omega", 2)
    held = [files / "sums", "--out", files / "words"]
    assert "not an empty directory" in refused(capsys, "fuse", "--base", files / "base", "--tuned", *held)
    with pytest.raises(SystemExit):
        run(*fuse_, files / "sums", "--max-shard-size", "5 parsecs")
    assert "5 parsecs" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wide", "wide.core"]
    assert load_file(files / "words" / "model.safetensors")


def test_an_interruption_or_a_full_disk_leaves_nothing(files, tmp_path, capsys, monkeypatch):
    def arguments(name):
        common = ["--base", files / "base", "--tuned", files / "sums", "--out", tmp_path / "out"]
        return ["core", *common] if name == "core" else ["fuse", *common]

    for error, status, text in (
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
        (OSError(28, "No space left on device"), 1, "no space left"),
    ):

        def raises(*_, error=error):
            raise error

        for name, target in (("core", "_select"), ("fuse", None)):
            with monkeypatch.context() as patched:
                if target:
                    patched.setattr(core_module, target, raises)
                else:
                    patched.setattr("epi_kernels.isolation.fusion._Fusion.produce", raises)
                assert run(*arguments(name)) == status
            assert text in capsys.readouterr().err
            assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_writable(files, tmp_path, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    text = refused(
        capsys, "fuse", "--base", files / "base", "--tuned", files / "sums", "--out", tmp_path / "out"
    )
    assert "out: cannot be written (Permission denied)" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), "fuse"), (("core",), "--ratio"), (("groups",), "--tau"), (("fuse",), "--omega")],
    ids=str,
)
def test_help_says_what_each_action_does(capsys, arguments, expected):
    with pytest.raises(SystemExit) as ended:
        run(*arguments, "--help")
    assert ended.value.code == 0 and expected in capsys.readouterr().out


def test_the_command_is_the_clis():
    assert cli.COMMANDS["isolate"].module == isolate.__name__
