"""The README's plots: drawn from results, stale when those say something else, whatever drew them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import plots, results
from epi_kernels.report import figures
from python_tests.bench_rows import complete_run
from python_tests.harness import ROOT


def test_committed_plots_show_the_committed_results():
    assert plots.stale(ROOT, results.RESULTS) == []


@pytest.mark.parametrize("name", plots.PLOTS)
def test_the_readme_shows_every_plot(name: str):
    assert f"]({plots.FOLDER.as_posix()}/{name}.svg)" in (ROOT / "README.md").read_text()
    root = ElementTree.parse(ROOT / plots.FOLDER / f"{name}.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("name", plots.PLOTS)
def test_drawn_to_the_same_bytes(name: str):
    assert plots.PLOTS[name].file(results.RESULTS) == plots.PLOTS[name].file(results.RESULTS)


def test_new_results_make_a_plot_stale(tmp_path: Path):
    folder = tmp_path / "results"
    cost, memory = "bench/plots/cost.svg", "bench/plots/memory.svg"
    assert plots.write(tmp_path, folder) == [memory], "nothing else was measured"
    assert plots.stale(tmp_path, folder) == []

    results.append(complete_run(), folder)
    assert plots.stale(tmp_path, folder) == [cost]
    assert plots.write(tmp_path, folder) == [cost]
    assert plots.stale(tmp_path, folder) == [] == plots.write(tmp_path, folder)
    drawn = (tmp_path / cost).read_text()

    slower = complete_run("2031-01-02T03:04:05Z")
    for row in slower:
        if row["name"].startswith("linear-step") and "ours_ms" in row:
            row["ours_ms"]["p50"] *= 2
    results.append(slower, folder)
    assert plots.stale(tmp_path, folder) == [cost]
    assert plots.write(tmp_path, folder) == [cost]
    assert (tmp_path / cost).read_text() != drawn

    assert plots.write(tmp_path, tmp_path / "none") == [cost]
    assert not (tmp_path / cost).exists(), "a plot of nothing"


def test_another_matplotlib_makes_nothing_stale(tmp_path: Path):
    plots.write(tmp_path, tmp_path / "none")
    path = tmp_path / plots.FOLDER / "memory.svg"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["drawn otherwise", lines[-1]]) + "\n")
    assert plots.stale(tmp_path, tmp_path / "none") == []
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert plots.stale(tmp_path, tmp_path / "none") == ["bench/plots/memory.svg"]


def test_what_did_not_run_is_left_out(tmp_path: Path):
    rows = results.newest_complete(results.RESULTS, "side-by-side")
    assert rows is not None
    ran = {row["contender"] for row in rows if row["list"] == rows[0]["list"] and "ratio" in row}
    skipped = {row["contender"] for row in rows if row["list"] == rows[0]["list"] and "skipped" in row}
    data = plots.PLOTS["side-by-side"].data(results.RESULTS)
    assert {row["contender"] for row in data} == ran and not ran & skipped
    assert json.loads(json.dumps(data)) == data


def test_bars_without_a_value_are_gaps():
    panel = figures.Panel("x", [1.0, None, 3.0], [0.5, None, 2.0], [1.5, None, 4.0], log=True, reference=1.0)
    text = figures.horizontal_bars(["a", "b", "c"], [panel], ["#123456"] * 3)
    full = figures.horizontal_bars(
        ["a", "b", "c"], [figures.Panel("x", [1.0, 2.0, 3.0], log=True)], ["#123456"] * 3
    )
    ElementTree.fromstring(text)
    assert text.count("fill: #123456") == 2 and full.count("fill: #123456") == 3
