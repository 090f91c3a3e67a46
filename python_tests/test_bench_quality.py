"""make quality: the arithmetic on hand-made masks and losses, the files, and a smoke run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bench import quality, quality_record, report, results
from bench.quality import CONFIGURATIONS, Plan
from python_tests.bench_rows import shared


def mask(*ones: int, size: int = 10) -> np.ndarray:
    found = np.zeros(size, dtype=bool)
    found[list(ones)] = True
    return found


def run(name: str, seed: int, loss: float, jaccard: float | None, state_bytes: int = 800) -> dict:
    return {
        "ratio": 0.1,
        "configuration": name,
        "seed": seed,
        "held_out_loss": loss,
        "isolated": 10,
        "parameters": 100,
        "state_bytes": state_bytes,
        "backend": "cpu",
        "seconds": 1.0,
        "jaccard": jaccard,
    }


def runs() -> list[dict]:
    """float32: mean 2, sd 1, spread 2; `near` is 1 worse on average, `far` 3."""
    losses = {"float32": (1.0, 2.0, 3.0), "near": (2.0, 3.0, 4.0), "far": (5.0, 5.0, 5.0)}
    overlaps = {"float32": (None,) * 3, "near": (0.5, 0.6, 0.7), "far": (0.1, 0.2, 0.3)}
    return [
        run(name, seed, losses[name][seed], overlaps[name][seed], 218 if name == "far" else 800)
        for name in losses
        for seed in range(3)
    ]


def record(date: str = "2030-01-02T03:04:05Z") -> dict:
    settings = {"steps": 1000, "interval": 100, "seeds": [1, 2, 3], "ratios": [0.1]}
    facts = {"settings": settings, "parameters": 100, "workers": 2, "wall_s": 1.0, "runs": runs()}
    return shared() | {"date": date} | facts | {"rows": quality_record.summarize(runs())}


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (mask(0, 1, 2), mask(0, 1, 2), 1.0),
        (mask(0, 1, 2), mask(2, 3), 0.25),
        (mask(0, 1), mask(2, 3), 0.0),
        (mask(), mask(1), 0.0),
        (mask(), mask(), 1.0),
        (mask(size=0), mask(size=0), 1.0),
    ],
)
def test_jaccard(a, b, expected):
    assert quality_record.jaccard(a, b) == quality_record.jaccard(b, a) == expected


def test_jaccard_of_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"masks of shapes \(10,\) and \(7,\)"):
        quality_record.jaccard(mask(1), mask(1, size=7))


@pytest.mark.parametrize(
    "losses, within",
    [
        ((1.0, 2.0, 3.0), True),
        ((4.0, 4.0, 4.0), True),  # 2 above, and the spread is 2
        ((0.0, 0.0, 0.0), True),
        ((4.0, 4.0, 4.5), False),
        ((-1.0, 0.0, 0.0), False),  # better by more than the spread is no agreement either
        ((1.0, 2.0, math.nan), False),
    ],
)
def test_within_spread(losses, within):
    assert quality_record.within_spread(losses, (1.0, 2.0, 3.0)) is within


def test_summary_of_hand_made_runs():
    base, near, far = quality_record.summarize(runs())
    assert base["held_out_loss"] == {"mean": 2.0, "sd": 1.0, "min": 1.0, "max": 3.0}
    assert base["difference"] == 0.0 and base["jaccard"] is None
    assert near["difference"] == 1.0 and near["within_spread"] and not far["within_spread"]
    assert near["jaccard"] == pytest.approx({"mean": 0.6, "min": 0.5, "max": 0.7})
    assert far["state_bytes_per_parameter"] == pytest.approx(2.18)
    with pytest.raises(ValueError, match="no float32 runs at ratio 0.1"):
        quality_record.summarize([run("near", 1, 1.0, 0.5)])


def test_masks_become_overlaps_with_float32_of_the_same_seed():
    found = quality.with_jaccard(
        [
            run("near", 2, 1.0, None) | {"mask": mask(2, 3)},
            run("float32", 1, 1.0, None) | {"mask": mask(5)},
            run("float32", 2, 1.0, None) | {"mask": mask(0, 1, 2)},
        ]
    )
    assert [one["jaccard"] for one in found] == [0.25, None, None]
    assert not any("mask" in one for one in found)


# ---------------------------------------------------------------- files and README


def test_written_whole_and_never_edited(tmp_path):
    first = quality_record.write_new(record(), tmp_path)
    assert first.name == "quality-some-2-cores-2030-01-02-0123456789.json"
    assert json.loads(first.read_text()) == record()
    before = first.read_bytes()
    second = quality_record.write_new(record("2030-01-02T04:00:00Z"), tmp_path)
    assert second.name.endswith("-2.json") and first.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    newest = quality_record.newest(tmp_path)
    assert newest is not None and newest["date"] == "2030-01-02T04:00:00Z"


def test_section_shows_the_rows(tmp_path):
    assert quality_record.section(tmp_path) == "Not measured yet: `make quality`."
    quality_record.write_new(record(), tmp_path)
    text = quality_record.section(tmp_path)
    assert "| 10 % | float32 | 2.000 ± 1.000 | - | (spread 2.000) | - | 8.00 |" in text
    assert "| 10 % | near | 3.000 ± 1.000 | +1.000 | yes | 0.60 (0.50-0.70) | 8.00 |" in text
    assert "| 10 % | far | 5.000 ± 0.000 | +3.000 | **no** | 0.20 (0.10-0.30) | 2.18 |" in text
    assert "(1 of 2)" in text and "0.053 at p = 10 %" in text
    assert report.SECTIONS["quality"] is quality_record.section


def test_committed_rows_follow_from_the_committed_runs():
    for path in results.RESULTS.glob("quality-*.json"):
        found = json.loads(path.read_text())
        assert found["rows"] == quality_record.summarize(found["runs"])
    newest = quality_record.newest(results.RESULTS)
    assert newest is not None
    ran = {(run["ratio"], run["configuration"], run["seed"]) for run in newest["runs"]}
    jobs = [(ratio, one.name, seed) for ratio, one, seed in Plan().jobs()]
    assert ran == set(jobs) and len(newest["runs"]) == len(jobs)


# ---------------------------------------------------------------- runs


def test_a_run_repeats_and_configurations_start_alike():
    plan = Plan().quick()
    base, nudged = CONFIGURATIONS[:2]
    first, again = (quality.train_once(plan, 0.1, base, seed=1) for _ in range(2))
    assert first["held_out_loss"] == again["held_out_loss"] and (first["mask"] == again["mask"]).all()
    apart = quality.train_once(plan, 0.1, nudged, seed=1)
    assert apart["held_out_loss"] == pytest.approx(first["held_out_loss"], abs=1e-4)
    assert first["isolated"] == first["mask"].sum() >= first["mask"].size // 10


def test_the_model_has_tensors_in_8_bits_and_below():
    model = quality._model(Plan(), CONFIGURATIONS[0], seed=1)
    sizes = [param.numel() for param in model.parameters()]
    assert min(sizes) < 4096 <= max(sizes)
    in_8_bits = sum(size for size in sizes if size >= 4096)
    assert in_8_bits > 0.99 * sum(sizes)


def test_quick_runs_everything_and_writes_nothing(tmp_path, capsys):
    assert quality.main(["--quick", "--workers", "1", "--out", str(tmp_path / "results")]) == 0
    text = capsys.readouterr().out
    for configuration in CONFIGURATIONS:
        for percent in ("1 %", "10 %"):
            assert f"| {percent} | {configuration.name} |" in text
    assert "not written" in text and not (tmp_path / "results").exists()


def test_workers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--workers", "0"])
    assert "must be at least 1" in capsys.readouterr().err
