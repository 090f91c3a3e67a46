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
    shapes,
    side_by_side,
    side_by_side_fit,
    side_by_side_table,
)
from bench.contenders import Contender
from bench.gpu_device import CpuDevice
from bench.published_epi import PublishedEPI
from bench.slices import Kept
from epi_kernels import MaskedEMAAdamW, footprint, memory, published
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


# ---------------------------------------------------------------- how much of an architecture


MIXED = {  # what the planner does not list
    F32: {"bfloat16 states": {"state_dtype": torch.bfloat16}, "8-bit importance": memory.OWN_IMPORTANCE},
    torch.bfloat16: {
        "float32 states": {"state_dtype": F32},
        "24-bit weights": {"master_weight_bits": 24},
        "8-bit states, 32-bit weights": {"state_dtype": "int8", "master_weight_bits": 32},
        "8-bit importance": memory.OWN_IMPORTANCE,
    },
}


def test_every_configuration_of_ours_steps_beside_the_others():
    """By its bytes a parameter, which no two of them have in common; "ours" is listed under its weights' name."""
    n = 1 << 20
    for dtype in (F32, torch.bfloat16):
        ours = [c for c in contenders.CONTENDERS if c.weights == dtype and c.name.startswith("ours")]
        held = set()
        for contender in ours:
            param = made(4096).to(dtype).detach().requires_grad_()
            param.grad = torch.ones_like(param)
            optimizer = contender.make([param])
            optimizer.step()
            held.add(side_by_side.stored_bytes(optimizer.state) - 4)
        for name, options in (memory.ours(dtype) | MIXED[dtype]).items():
            assert (footprint.masked_ema_adamw([n], dtype, **options)["total"] - 4) * 4096 / n in held, name


@pytest.fixture(scope="module")
def models() -> dict[str, shapes.Architecture]:
    return shapes.architectures()


def test_architectures_give_both_ends_and_as_many_layers_as_fit(models):
    assert list(models) == ["Llama-2-7B", "Llama-3-8B", "Mistral-7B", "Qwen2-7B", "Gemma-2-9B"]
    llama, gemma = models["Llama-3-8B"], models["Gemma-2-9B"]
    layer, ends = 218_112_000, 2 * 128_256 * 4096 + 4096
    assert gemma.before == [(256_000, 3584)] and gemma.after == [(3584,)], "its head is its embedding"
    assert llama.elements == ends + 32 * layer == 8_030_261_248
    for elements, layers, with_ends in [
        (1, 1, False),
        (3 * layer - 1, 2, False),
        (ends + layer - 1, 5, False),
        (ends + layer, 1, True),
        (ends + 3 * layer, 3, True),
        (10**10, 32, True),
    ]:
        chosen = llama.fitting(elements)
        assert (chosen.layers, chosen.ends) == (layers, with_ends)
        assert chosen.elements == layers * layer + with_ends * ends
    whole = llama.fitting(10**10)
    assert whole.shapes[0] == whole.shapes[-1] == (128_256, 4096) and whole.shapes[-2] == (4096,)
    assert whole.facts() == {"layers": 32, "ends": True, "of_layers": 32, "of_elements": 8_030_261_248}


def test_the_limit_on_a_cpu_holds_both_ends_of_every_architecture(models):
    assert all(model.fitting(side_by_side_fit.CPU_ELEMENTS).ends for model in models.values())


class Free(CpuDevice):
    """A device with so many bytes free; ``type``: whose limits hold."""

    def __init__(self, free: float, type: str = "cpu"):
        self.free, self.type = free, type

    def free_bytes(self) -> int:
        return int(self.free)


TOY = shapes.Architecture([(100, 64)], [[(64, 64), (64,)]] * 10, [(64,), (100, 64)])  # 12,864 and 10 x 4,160
OURS = {"dtype": "float32", "elements": 100, "state_bytes_per_element": 12.125, "step_peak_bytes": None}


@pytest.mark.parametrize(
    ("room", "taken", "type", "layers"),
    [
        (24.125 * (12_864 + 3 * 4_160), {}, "cpu", 3),
        (28.125 * (12_864 + 3 * 4_160), {"ours, more": OURS}, "cpu", 3),  # ours that take most decide
        (
            28.125 * (12_864 + 3 * 4_160),
            {"a peer": OURS, "ours, bf16": OURS | {"dtype": "bfloat16"}},
            "cpu",
            4,
        ),
        (36.125 * (12_864 + 3 * 4_160), {"ours, more": OURS | {"refresh_peak_bytes": 800}}, "cpu", 3),
        (24.125 * TOY.elements, {"ours, more": OURS}, "cuda", 10),  # all of it, for those that fit
        (1e9, {}, "cpu", 5),  # the limit
        (1e9, {}, "cuda", 10),
    ],
)
def test_the_list_is_what_the_free_memory_holds(room, taken, type, layers):
    device = Free(room / side_by_side_fit.ROOM + 100, type)
    chosen = side_by_side_fit.fitting(TOY, F32, device, taken, 12_864 + 5 * 4_160)
    assert (chosen.layers, chosen.ends) == (layers, True)


def test_who_sits_out_says_the_bytes_or_the_seconds():
    row = {"elements": 10**8, "state_bytes_per_element": 13.0, "ns_per_element": 4.0}
    row |= {"step_peak_bytes": 8e8, "refresh_peak_bytes": 24e8}
    ask = lambda free, seconds: side_by_side_fit.sits_out(row, 10**9, 16 * 10**9, Free(free), seconds)  # noqa: E731
    assert ask(37e9 / side_by_side_fit.ROOM + 1, 4.0) == {}
    assert ask(36e9, 4.0) == {
        "skipped": "needs 53.0 GB with weights, gradients and torch fused's state, 52.0 GB are there",
        "needs_bytes": 53 * 10**9,
    }
    assert ask(1e12, 3.9) == {"skipped": "about 4 s a step"}
    assert side_by_side_fit.sits_out(None, 10**9, 16 * 10**9, Free(0), 0.0) == {}, "nothing is known of it"


def test_a_table_says_how_much_of_an_architecture_and_who_needs_more(monkeypatch, tmp_path):
    """Free memory for two layers of ours, none for what takes more; bfloat16's list is longer."""
    monkeypatch.setattr(side_by_side, "architectures", lambda: {"toy": TOY})
    temporary = 24 * side_by_side.QUICK.elements

    def peaks(device, call):
        call()
        return temporary if isinstance(call.__self__, PublishedEPI) else 0

    monkeypatch.setattr(side_by_side, "peak_bytes", peaks)
    names = ("torch fused, float32", "ours, float32", "EPI as published, float32")
    names += ("torch fused, bfloat16", "ours, bfloat16")
    entered = [c for c in contenders.CONTENDERS if c.name in names]
    plan = replace(side_by_side.QUICK, architectures=True)
    with on_threads():
        room = Free(1.1 * 24.125 * (12_864 + 2 * 4_160))
        rows = side_by_side.run(entered, room, plan, complete=True, kept=Kept(tmp_path / "state"))
    assert rows is not None
    results.append(rows, tmp_path, prefix="side-by-side")
    text = side_by_side_table.text(tmp_path)
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "toy: 2 of 10 layers, embedding, norm and head; 21,184 elements in 7 tensors, of 54,464 |" in text
    assert "toy: 7 of 10 layers, embedding, norm and head; 41,984 elements in 17 tensors, of 54,464 |" in text
    (epi,) = [row for row in rows if row["contender"].startswith("EPI") and row["list"] == "toy"]
    assert epi["needs_bytes"] > 21_184 * (16 + 13 + 24) and "'Needs': did not run" in text
    assert lines["| EPI as published, float32"].endswith(f"needs {epi['needs_bytes'] / 1e9:.1f} GB |")
    ran = [row for row in rows if row["list"] == "toy" and "ratio" in row]
    assert [row["contender"] for row in ran] == [name for name in names if not name.startswith("EPI")]
    for dtype in ("float32", "bfloat16"):
        assert len({row["elements"] for row in rows if row["list"] == "toy" and row["dtype"] == dtype}) == 1
        assert f"Other parameter lists, {dtype} weights; " in text


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
