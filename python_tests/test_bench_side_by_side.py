"""bench.side_by_side: EPI as published, what counts as state, contenders that cannot run, the README's table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import (
    contenders,
    markdown,
    results,
    side_by_side,
    side_by_side_table,
)
from bench.contenders import Contender
from bench.gpu_device import CpuDevice
from bench.published_epi import PublishedEPI
from bench.slices import Kept
from epi_kernels import MaskedEMAAdamW, published
from python_tests.threads import on_threads

F32 = torch.float32


def made(n: int = 400, seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(n, generator=generator))
    param.grad = torch.randn(n, generator=generator)
    return param


# ---------------------------------------------------------------- EPI as published


def test_published_epi_steps_as_adamw_does():
    ours, torchs = made(), made()
    epi, adamw = PublishedEPI([ours], lr=1e-2), torch.optim.AdamW([torchs], lr=1e-2)
    for _ in range(5):
        epi.step()
        adamw.step()
    torch.testing.assert_close(ours, torchs)


def test_published_epi_isolates_the_largest_normalised_importances():
    small, large = made(seed=1), made(seed=2)
    assert small.grad is not None and large.grad is not None
    large.grad *= 100  # as important as `small` once normalised within each tensor
    epi = PublishedEPI([small, large], ratio=0.05)
    epi.step()
    epi.refresh()
    masks = [epi.state[param]["isolation_mask"] for param in (small, large)]
    assert sum(int(mask.sum()) for mask in masks) == 40
    for param, mask in zip((small, large), masks):
        assert mask.any() and param.grad is not None
        assert param.grad[mask].abs().min() > param.grad[~mask].abs().max()
    before = [param.detach().clone() for param in (small, large)]
    epi.step()
    for param, mask, old in zip((small, large), masks, before):
        assert torch.equal(param[mask], old[mask]) and (param[~mask] != old[~mask]).all()


def test_published_epi_takes_what_published_says():
    param = made()
    epi = PublishedEPI([param])
    epi.step()
    assert side_by_side.stored_bytes(epi.state) == published.STATE_TOTAL_BYTES * param.numel()


# ---------------------------------------------------------------- bytes and pairs


class Wrapped(torch.Tensor):
    """A quantised state as peers have it: a float32 tensor to the outside, two tensors within."""

    def __new__(cls, codes, scale):
        wrapped = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=F32)
        wrapped.codes, wrapped.scale = codes, scale
        return wrapped

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_stored_bytes_count_what_a_wrapper_holds():
    wrapped = Wrapped(torch.zeros(64, dtype=torch.uint8), torch.zeros(1))
    assert side_by_side.stored_bytes({"a": [wrapped, torch.zeros(3)], "step": 7}) == 64 + 4 + 12


def test_stored_bytes_are_our_own_account():
    param = made(5000)
    ours = MaskedEMAAdamW([param], state_dtype="int8")
    ours.step()
    assert side_by_side.stored_bytes(ours.state) == ours.state_bytes()["total"]


@pytest.mark.parametrize("swap", [False, True])
def test_both_of_a_pair_are_told_apart_whoever_goes_first(swap):
    order = []
    first, second = side_by_side.time_pair(
        CpuDevice(),
        lambda: order.append("first"),
        lambda: (order.append("second"), torch.randn(200_000).sort()),
        swap=swap,
    )
    assert order == (["second", "first"] if swap else ["first", "second"])
    assert first < second


# ---------------------------------------------------------------- rows


def refuses(params):
    raise ImportError("No module named 'somebody'")


def test_what_cannot_run_becomes_a_row_that_says_why():
    contender = Contender("somebody", F32, refuses, False, "absent")
    row = side_by_side.measure(contender, [made()], lambda: None, CpuDevice(), side_by_side.QUICK)
    assert row == {"skipped": "ImportError: No module named 'somebody'"}


def test_every_contender_has_a_reference_and_a_name_of_its_own():
    names = [contender.name for contender in contenders.CONTENDERS]
    slugs = {contender.slug for contender in contenders.CONTENDERS}
    assert len(slugs) == len(set(names)) == len(names)
    for dtype, reference in contenders.REFERENCE.items():
        assert [c.weights for c in contenders.CONTENDERS if c.name == reference] == [dtype]


def test_a_run_is_written_and_becomes_a_table(tmp_path, capsys):
    with on_threads():
        status = side_by_side.main(
            ["--quick", "--device", "cpu", "--only", "float32", "--out", str(tmp_path)]
        )
    assert status == 0
    (path,) = tmp_path.glob("side-by-side-*.json")
    rows = results.load(path)
    wanted = [contender.name for contender in contenders.CONTENDERS if "float32" in contender.name]
    for name in {row["list"] for row in rows}:
        assert [row["contender"] for row in rows if row["list"] == name] == wanted
    ran = {row["contender"]: row for row in rows if "skipped" not in row}
    assert {"torch fused, float32", "ours, float32", "EPI as published, float32"} <= ran.keys()
    assert ran["ours, float32"]["state_bytes_per_element"] == pytest.approx(8.125, abs=0.01)
    moved = {name: ran[name]["bytes_per_element"] for name in ("torch fused, float32", "ours, float32")}
    assert moved["torch fused, float32"] == pytest.approx(28, abs=0.02)
    assert moved["ours, float32"] == pytest.approx(28.125, abs=0.02), "the mask is read and not written"

    assert "Not measured yet" in side_by_side_table.text(tmp_path), "a smoke run is no result"
    path.write_text(json.dumps([row | {"complete": True} for row in rows]))
    text = side_by_side_table.text(tmp_path)
    for row in rows:
        assert row["contender"] in text
    assert "| **ours, float32** | yes |" in text and "| torch fused, float32 | no |" in text
    machine = rows[0]["machine"]
    assert text.startswith(f"{machine['cpu']} ({machine['isa']}), ")
    assert_likeness_is_said(text, rows)


def assert_likeness_is_said(text: str, rows: list[dict]) -> None:
    """Every row of the first table says what is like and unlike, whatever else it has."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    header = next(line for line in lines if line[0] == "optimizer")
    assert header[-2:] == ["like", "unlike"]
    cells = {line[0].strip("*"): line[-2:] for line in lines if len(line) == len(header)}
    for row in rows:
        like, unlike = cells[row["contender"]]
        if row["contender"] == row["beside"]:
            assert (like, unlike) == ("the reference", "-")
        else:
            assert like.startswith("weights, gradients") and unlike
            assert ("isolates" in unlike) == row["isolates"] != ("isolates nothing" in like)


def test_the_committed_record_says_its_instruction_set_and_what_is_like():
    rows = side_by_side_table.newest(results.RESULTS)
    assert rows is not None
    text = side_by_side_table.text()
    assert f"{rows[0]['machine']['cpu']} ({rows[0]['machine']['isa']}), " in text
    assert_likeness_is_said(text, rows)


def test_likeness_of_a_row():
    reference = {"contender": "torch", "isolates": False, "note": "isolates nothing", "state": 8.0}

    def cells(**row):
        row = {"contender": "other", "isolates": False, "note": "isolates nothing; CPU only", **row}
        return markdown.alike(row, reference, "state")

    assert cells(state=8.125) == ("weights, gradients, size of the state, isolates nothing", "CPU only")
    assert cells(state=2.0) == (
        "weights, gradients, isolates nothing",
        "state of 2.0 bytes, not 8.0; CPU only",
    )
    assert cells() == ("weights, gradients, isolates nothing", "CPU only"), "it did not run"
    ours = cells(isolates=True, note="importance is exp_avg_sq", state=8.125)
    assert ours == ("weights, gradients, size of the state", "isolates; importance is exp_avg_sq")
    assert cells(contender="torch") == ("the reference", "-")
    rounds = cells(note="isolates nothing; weights round to nearest; CPU only", state=8.0)
    assert rounds == (
        "weights, gradients, size of the state, isolates nothing, weights round to nearest",
        "CPU only",
    )
    known = cells(contender="torch foreach, float32", note="as it was said", state=8.0)
    assert known[1] == "an operation at a time"


DEFAULT = [contender for contender in contenders.CONTENDERS if contender.name == "ours, float32"]


def test_a_slow_contender_sits_out_the_other_lists(tmp_path):
    plan = replace(side_by_side.QUICK, slow_seconds=0.0)
    rows = side_by_side.run(DEFAULT, CpuDevice(), plan, complete=False, kept=Kept(tmp_path / "state"))
    assert rows is not None
    first, second = rows
    assert first["list"] == "one-tensor" and "ours_ms" in first
    assert second["skipped"] == "about 0 s a step"


def test_a_run_goes_on_where_its_time_ended(tmp_path):
    """The second call measures what the first did not; the copy is of the first, as is what it left."""
    state = tmp_path / "state"
    arguments = (DEFAULT, CpuDevice(), side_by_side.QUICK, False)
    assert side_by_side.run(*arguments, Kept(state), limit=0.5) is None
    begun = Kept(state).done
    assert begun.keys() == {"copy"}
    rows = side_by_side.run(*arguments, Kept(state))
    assert rows is not None and [row["list"] for row in rows] == ["one-tensor", "small-tensors"]
    assert all(row["copy_gbps"] == begun["copy"]["shared"]["copy_gbps"] for row in rows)
    done = json.loads(state.read_text())["done"]
    assert [row["ours_ms"] for row in rows] == [
        row["ours_ms"] for result in done.values() for row in result.get("rows", ())
    ]
    assert side_by_side.run(*arguments, Kept(state)) == rows, "nothing is measured twice"


def test_a_list_that_could_not_be_made_is_tried_again(tmp_path, monkeypatch):
    def no_room(*arguments):
        raise torch.OutOfMemoryError("no room")

    arguments = (DEFAULT, CpuDevice(), side_by_side.QUICK, False)
    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "parameters", no_room)
        with pytest.raises(RuntimeError, match="small-tensors-float32: OutOfMemoryError: no room"):
            side_by_side.run(*arguments, Kept(tmp_path / "state"))
    assert side_by_side.run(*arguments, Kept(tmp_path / "state")) is not None


def test_an_older_record_says_what_its_lists_were_and_why_cells_are_empty(tmp_path):
    """Lists of layers alone, which rows did not count; who sat one out for its time said so."""
    rows = [row for row in side_by_side_table.newest(results.RESULTS) or [] if row["list"] != "small-tensors"]
    kept = ("layers", "ends", "of_layers", "of_elements", "needs_bytes")
    rows = [{key: value for key, value in row.items() if key not in kept} for row in rows]
    for row in rows:
        if row["list"] == "Gemma-2-9B" and row["contender"] == "torch fused, float32":
            row["skipped"] = "6 s a step of Llama-2-7B"
            del row["ratio"], row["ours_ms"]
    (tmp_path / "side-by-side-old.json").write_text(json.dumps(rows))
    text = side_by_side_table.text(tmp_path)
    assert " Gemma-2-9B: decoder layers alone; " in text and "| 6 s a step of Llama-2-7B |" in text


def test_an_unknown_word_names_the_contenders(capsys):
    with pytest.raises(SystemExit):
        side_by_side.main(["--quick", "--device", "cpu", "--only", "nobody"])
    assert "torch fused, float32" in capsys.readouterr().err


def test_committed_results_load():
    for path in results.RESULTS.glob("side-by-side-*.json"):
        assert results.load(path)
