"""`epi-kernels demo`: its tasks, its arithmetic, and the command at a tiny size."""

from __future__ import annotations

import errno
import json
import os
import random

import pytest
import torch

from epi_kernels import cli
from epi_kernels.demo import command, pool, protocol, report_page, tasks, text, train
from epi_kernels.scores import ABOVE, BELOW, INSIDE, Point, chance_jaccard, compare, frontier, spread

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- tasks


def decoded(examples: tasks.Examples, row: int) -> str:
    """The characters asked for in a row."""
    return "".join(tasks.ALPHABET[code] for code in examples.labels[row].tolist() if code != tasks.IGNORED)


@pytest.mark.parametrize(
    "a, b, pair",
    [
        (47, 38, ("47+38=", "15;08;085.")),
        (99, 99, ("99+99=", "18;19;198.")),
        (10, 0, ("10+00=", "00;01;010.")),
    ],
)
def test_sum_with_steps(a, b, pair):
    assert tasks.sum_with_steps(a, b) == pair


@pytest.mark.parametrize(
    "name, answer", [("rev", "3ab."), ("upp", "BA3."), ("dup", "ba3ba3."), ("srt", "3ab."), ("las", "3.")]
)
def test_new_instructions(name, answer):
    assert tasks.instruction(name, "ba3", tasks.NEW) == (f"{name} ba3=", answer)


def test_known_and_new_instructions_share_no_name():
    assert not tasks.KNOWN.keys() & tasks.NEW.keys()
    swapped = {name: operation("ab3") for name, operation in tasks.KNOWN.items()}
    assert swapped == {"cpy": "ab3", "rot": "b3a", "swp": "ba3", "dbl": "aabb33", "fst": "a", "mid": "b"}


@pytest.mark.parametrize("seed", [0, 1])
def test_training_and_evaluation_prompts_are_disjoint_and_differ_by_seed(seed):
    made = tasks.make_tasks(seed)
    for learned, tested in ((made.learn_a, made.test_a), (made.learn_b, made.test_b)):
        learned_prompts = {prompt for prompt, _ in learned.pairs}
        tested_prompts = {prompt for prompt, _ in tested.pairs}
        assert len(learned_prompts) == len(learned) == 4000
        assert len(tested_prompts) == len(tested) == 200
        assert not learned_prompts & tested_prompts
    assert made.learn_a.pairs != tasks.make_tasks(seed + 1).learn_a.pairs
    assert made.learn_a.pairs == tasks.make_tasks(seed).learn_a.pairs


def test_every_operation_is_tested():
    made = tasks.make_tasks(0)
    assert {prompt[:3] for prompt, _ in made.test_b.pairs} == tasks.NEW.keys()


def test_labels_are_the_answers_and_inputs_end_before_their_last_character():
    made = tasks.make_tasks(0, learn=50, known=50, test=20)
    for part in (made.learn_a, made.known, made.test_a, made.learn_b, made.test_b):
        for row, (prompt, answer) in enumerate(part.pairs):
            assert decoded(part, row) == answer
            shown = "".join(tasks.ALPHABET[code] for code in part.ids[row].tolist())
            assert shown.rstrip(tasks.PAD) == (prompt + answer)[:-1]


def test_too_few_sums_are_refused():
    with pytest.raises(ValueError, match="900 sums are too few for 4000"):
        tasks.make_tasks(0, largest=9)


def test_score_equals_greedy_decoding():
    made = tasks.make_tasks(0, learn=300, known=0, test=30)
    model = train.make_model(0, 32, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    only = tasks.encode(random.Random(0).choices(made.learn_b.pairs, k=40))
    train.train(model, optimizer, only, 60, 20, 0, lambda step: None)
    right = 0
    for prompt, answer in only.pairs:
        written = prompt
        for _ in answer:
            ids = torch.tensor([[tasks.CODE[character] for character in written]])
            written += tasks.ALPHABET[model(input_ids=ids).logits[0, -1].argmax()]
        right += written == prompt + answer
    assert 0 < right < len(only)
    assert train.score(model, only) == pytest.approx(100 * right / len(only))


# ---------------------------------------------------------------- dA@B

BEFORE = Point(b=0, a=100)
FULL = [Point(b=90, a=10), Point(b=50, a=40)]


@pytest.mark.parametrize(
    "run, gain, full_a, where",
    [
        (Point(70, 60), 35, 25, INSIDE),  # halfway between the two runs
        (Point(60, 20), -12.5, 32.5, INSIDE),  # loses
        (Point(50, 40), 0, 40, INSIDE),
        (Point(90, 10), 0, 10, INSIDE),
        (Point(95, 30), 20, 10, ABOVE),  # AdamW is given the A of its highest B
        (Point(25, 90), 20, 70, BELOW),  # halfway from before stage B to the lower run
        (Point(0, 100), 0, 100, BELOW),  # nothing learned, nothing lost: no gain
        (Point(-1, 100), 0, 100, BELOW),
    ],
)
def test_gain_at_the_same_b(run, gain, full_a, where):
    assert compare(run, FULL, BEFORE) == (gain, full_a, where)
    assert compare(run, FULL[::-1], BEFORE) == (gain, full_a, where)


def test_a_run_beaten_on_both_scores_is_no_part_of_the_frontier():
    full = [Point(50, 40), Point(40, 30), Point(50, 20)]
    assert frontier(full) == [Point(50, 40)]
    assert compare(Point(40, 45), full, BEFORE) == (pytest.approx(-7), pytest.approx(52), BELOW)
    assert frontier([Point(50, 40)] * 2) == [Point(50, 40)]


def test_below_the_range_without_room_to_before():
    assert compare(Point(40, 45), [Point(50, 40)], Point(60, 100)) == (5, 40, BELOW)


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert spread([4.0]) == (4.0, 0.0, 1)
    assert chance_jaccard(0.2) == pytest.approx(1 / 9)
    assert chance_jaccard(0.2, 0.2) == pytest.approx(1 / 9)
    assert chance_jaccard(0.5, 0.2) == pytest.approx(1 / 6)
    assert chance_jaccard(0.0, 0.0) == 1.0


def gain(*values: float) -> dict:
    return {**spread(values)._asdict(), "runs": [{"gain": value} for value in values]}


def test_the_verdict_follows_the_numbers():
    assert text._outcome(gain(1, 2, 3), "AdamW").startswith("Isolation keeps more")
    assert text._outcome(gain(5, 2, -1), "AdamW").startswith("No clear winner")
    lost = text._outcome(gain(-5, -2, 1), "AdamW")
    assert lost.startswith("Isolation LOSES on average: ") and "-2.0 ± 3.0" in lost and "1 of 3 seeds" in lost
    assert text._outcome(gain(-5, -2, -1), "AdamW").startswith("Isolation LOSES: ")


def test_b_outside_the_frontier_is_said():
    def where(inside: int, below: int, above: int) -> dict:
        return {"n": 3, "where": {INSIDE: inside, BELOW: below, ABOVE: above}}

    assert text._places(where(3, 0, 0), "AdamW") is None
    said = text._places(where(0, 1, 2), "AdamW")
    assert said is not None
    assert "2 of 3 seeds isolation's B is above" in said and "1 of 3 seeds isolation's B is below" in said


# ---------------------------------------------------------------- the command


def demo(out, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["demo", "--quick", "--out", str(out), *arguments])
    return status, json.loads((out / "results.json").read_text())


def test_quick_end_to_end(tmp_path, capsys):
    status, results = demo(tmp_path / "new" / "folder", "--seeds", "1", "--threads", "1")
    assert status == 0 and results["learned"]
    assert {
        "version", "settings", "seeds", "before", "arms", "price_on_b", "drift", "optimizer_bytes", "backend", "timing",
    } <= results.keys()  # fmt: skip
    assert [arm["kind"] for arm in results["arms"]] == [
        "adamw",
        "adamw",
        "kept",
        "kept",
        "random",
        "isolation",
    ]
    isolation = results["arms"][-1]
    assert {"a", "b", "gain", "gain_over_kept", "curve", "ratio"} <= isolation.keys()
    assert isolation["ratio"] == results["settings"]["ratio"] == 0.2
    assert [point["step"] for point in isolation["curve"]] == [0, 5, 10, 15]

    n = results["optimizer_bytes"]["n_parameters"]
    refreshes = results["drift"]["refreshes"]
    assert [row["step"] for row in refreshes] == [0, 5, 10, 15]
    assert refreshes[0]["isolated"]["mean"] == refreshes[0]["entered"]["mean"] == int(0.2 * n)
    size = results["optimizer_bytes"]
    assert size["epi_as_published"] == 13 * n and size["epi_as_published_refresh"] == 8 * n
    assert 8 * n < size["torch_adamw"] < size["isolation"] < 8.2 * n

    page = (tmp_path / "new" / "folder" / "index.html").read_text()
    assert page.count("data:image/svg+xml") == 5 and "http" not in page.split("</style>")[1]
    printed = capsys.readouterr().out
    assert printed.startswith("A QUICK RUN: its numbers show nothing")
    assert page.index("its numbers show nothing") < page.index("Task A")
    assert all(arm["b"]["mean"] < 5 for arm in results["arms"])
    for shown in (printed, page):
        assert "No comparison is possible: no arm learned B" in shown and "The price on B" not in shown
    for expected in (
        "Ratio used: p = 20 %",
        "Jaccard",
        "a parameter",
        "index.html",
    ):
        assert expected in printed

    # The same numbers as a run at full size in which this was enough of B.
    results["settings"] |= {"quick": False, "needed_b": 0.0}
    printed, page = text.report(results), report_page.write_page(results, tmp_path / "full.html").read_text()
    for shown in (printed, page):
        assert "The price on B" in shown and "dA@B over AdamW" in shown
        assert "No comparison" not in shown and "QUICK" not in shown


def without_timing(results: dict) -> dict:
    return {name: value for name, value in results.items() if name != "timing"}


def test_a_not_learned_exits_1_and_seeds_repeat_whatever_the_workers(tmp_path, capsys):
    short = ("--seeds", "2", "--steps-a", "3", "--steps-b", "6", "--json")
    status, here = demo(tmp_path / "here", *short, "--threads", "1")
    captured = capsys.readouterr()
    assert status == 1 and not here["learned"]
    assert "was NOT learned" in captured.err
    assert without_timing(json.loads(captured.out)) == without_timing(here)
    assert "NOT learned" in (tmp_path / "here" / "index.html").read_text()

    status, spawned = demo(tmp_path / "spawned", *short, "--threads", "2")
    assert status == 1
    assert without_timing(spawned) == without_timing(here)
    assert spawned["timing"]["workers"] == 2


def test_an_out_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch, capsys):
    def read_only(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def never(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(command, "write_whole", read_only)
    monkeypatch.setattr(pool, "run_all", never)
    with pytest.raises(SystemExit) as refusal:
        cli.main(["demo", "--quick", "--out", str(tmp_path)])
    assert refusal.value.code == 2 and "Read-only file system" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_does_not_take_the_results(tmp_path, monkeypatch, capsys):
    def full(found, out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "_write", full)
    short = ("--seeds", "1", "--threads", "1", "--steps-a", "0", "--steps-b", "1", "--json")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path), *short]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["seeds"] == [1]
    assert "No space left on device; the results above are not kept" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_no_step_of_a_at_all_exits_1(tmp_path):
    status, results = demo(tmp_path, "--seeds", "1", "--threads", "1", "--steps-a", "0", "--steps-b", "1")
    assert status == 1 and not results["learned"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--seeds", "0"), "--seeds 0: must be at least 1"),
        (("--threads", "0"), "--threads 0: must be at least 1"),
        (("--steps-b", "0"), "--steps-b 0: must be at least 1"),
        (("--ratio", "1"), "--ratio 1.0: must lie between 0 and 1"),
        (("--ratio", "nan"), "--ratio nan: must lie between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as refusal:
        demo(tmp_path, *arguments)
    assert refusal.value.code == 2 and capsys.readouterr().err == f"epi-kernels demo: {message}\n"


def test_out_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as refusal:
        demo(tmp_path / "file" / "x")
    assert refusal.value.code == 2 and "file/x: Not a directory" in capsys.readouterr().err


def test_help_states_the_numbers_in_use():
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    settings, shown = protocol.Settings(), parser.format_help()
    for name, value in (
        ("steps of stage A", settings.steps_a),
        ("steps of stage B", settings.steps_b),
        ("ratio p", settings.ratio),
    ):
        assert f"{name} ({value})" in " ".join(shown.split())
