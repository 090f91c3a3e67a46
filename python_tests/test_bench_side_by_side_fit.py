"""bench.side_by_side_fit: how much of an architecture a machine holds, and who sits a list out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import contenders, results, shapes, side_by_side, side_by_side_fit, side_by_side_table
from bench.gpu_device import CpuDevice
from bench.published_epi import PublishedEPI
from bench.slices import Kept
from epi_kernels import footprint, memory
from python_tests.threads import on_threads

F32 = torch.float32


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
            param = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
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
