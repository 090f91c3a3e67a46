"""Result files are appended and never edited; the README's tables come from the newest whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import memory_table, plots, registry, report, results, run, sources
from python_tests.bench_rows import complete_run

# ---------------------------------------------------------------- files


def test_appended_and_never_edited(tmp_path):
    first = results.append(complete_run(), tmp_path)
    assert first.name == "cpu-some-2-cores-2030-01-02-0123456789.json"
    before = first.read_bytes()
    second = results.append(complete_run(ms=3.0), tmp_path)
    assert second != first and first.read_bytes() == before
    assert results.load(first) == json.loads(before)


def test_newest_complete_run_counts(tmp_path):
    assert results.newest_complete(tmp_path) is None
    results.append(complete_run("2030-01-02T03:04:05Z"), tmp_path)
    results.append(complete_run("2030-01-03T03:04:05Z"), tmp_path)
    partial = [row | {"complete": False} for row in complete_run("2030-01-04T03:04:05Z")]
    results.append(partial, tmp_path)
    newest = results.newest_complete(tmp_path)
    assert newest is not None and newest[0]["date"] == "2030-01-03T03:04:05Z"


def test_committed_results_load():
    for path in results.RESULTS.glob("cpu-*.json"):
        assert results.load(path)


# ---------------------------------------------------------------- tables


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(
        "# title\n\n<!-- bench:begin cpu -->\n<!-- bench:end cpu -->\n\nbetween\n\n"
        "<!-- bench:begin memory -->\nold\n<!-- bench:end memory -->\n\nafter\n"
    )
    return path


def test_tables_are_written_between_the_markers(readme, tmp_path, capsys):
    folder = tmp_path / "results"
    results.append(complete_run(), folder)
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert "old\n" in readme.read_text(), "--check writes nothing"
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# title\n\n<!-- bench:begin cpu -->\n") and text.endswith("\n\nafter\n")
    assert "\n\nbetween\n\n" in text and "old\n" not in text
    # 2 ms beside 1, 2 and 2 ms
    assert "| bfloat16, rounding to nearest | 1,000,000 | 2 | 2 | 1.00 (1.00-1.60) | 1.02 met |" in text
    assert "| minmax, global | 1.00 (1.00-1.60) |" in text and "within 0% (met)" in text
    assert "0.25 MiB above a step's (at most 1: met)" in text
    assert report.main([*arguments, "--check"]) == 0

    readme.write_text(text.replace("0.25 MiB", "0.00 MiB"))
    assert report.main([*arguments, "--check"]) == 1
    assert "out of date: README.md: make tables" in capsys.readouterr().err


def test_the_readme_is_what_the_committed_results_make(monkeypatch, capsys):
    """Tables, plots and pictures: writing them anew would change nothing, and no picture is left out."""
    known = {(plots.FOLDER / f"{name}.svg").as_posix() for name in plots.PLOTS}
    tools = iter(report.REPRODUCED)

    def render(*arguments):
        tables, tool = report_render(*arguments), next(tools)
        known.update(
            (plots.FOLDER / tool / f"{one.name}.png").as_posix() for t in tables for one in t.figures
        )
        return tables

    report_render = report.render
    monkeypatch.setattr(report, "render", render)
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    pictures = set(re.findall(r"\]\(([^)]+\.(?:svg|png))\)", report.README.read_text()))
    assert pictures and pictures <= known


def test_a_limit_of_milliseconds_says_so_beside_ratios(tmp_path):
    rows = complete_run(ms=0.3)
    tiny = next(row for row in rows if row["name"] == "tensors-f32-300-tiny")
    tiny |= {"target": registry.HOST._asdict(), "met": True}
    results.append(rows, tmp_path)
    lines = report.cpu(tmp_path).splitlines()
    assert " 0.4 ms met " in next(line for line in lines if line.startswith("| float32, 300 tensors of 16 "))
    assert " 1.02 met " in next(line for line in lines if line.startswith("| float32 |"))


def test_a_caption_says_whether_the_kernels_changed(tmp_path):
    said = "**the kernels have changed since**"
    rows = complete_run()
    now = sources.kernel_hashes()
    for number, (kernels, changed) in enumerate(
        [(now, False), (now | {"cuda": "another"}, False), (now | {"cpu": "another"}, True)]
    ):
        folder = tmp_path / str(number)
        results.append([row | {"kernels": kernels} for row in rows], folder)
        assert (said in report.cpu(folder)) is changed
        assert "was not recorded" not in report.cpu(folder)
    results.append(rows, tmp_path / "old")
    assert "whether the kernels have changed since was not recorded" in report.cpu(tmp_path / "old")
    assert results.provenance()["kernels"] == now


def test_without_results_the_table_says_so(readme, tmp_path):
    report.main(["--readme", str(readme), "--results", str(tmp_path / "none")])
    assert "Not measured yet: `make bench`." in readme.read_text()


def test_markers_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="marks a block 'typo'"):
        report.rewrite("<!-- bench:begin typo -->\n<!-- bench:end typo -->")
    with pytest.raises(ValueError, match="lacks its bench:end"):
        report.rewrite("<!-- bench:begin cpu -->\n")


def test_memory_table_counts_real_optimizers():
    text = memory_table.text()
    for name, total in [
        ("torch AdamW, float32 weights", "8"),
        ("EPI as published (float32 EMA, bool mask, sort)", "13"),
        ("ours, default, float32 weights", "8.125"),
        ("ours, default, bfloat16 weights", "4.125"),
    ]:
        assert re.search(rf"^\| {re.escape(name)} \|.*\| \*\*{total}\*\* \|", text, re.MULTILINE), text


def test_a_refresh_that_memory_could_not_serve_is_noise_and_not_met():
    rows = complete_run()
    after = [row for row in rows if row["name"] == "refresh-bf16-minmax-global-after-step"]
    assert len(after) == 1
    text = report._refresh_table(rows)
    assert "noise" not in text
    for share in (None, -0.1, 0.0, 2.5):
        after[0]["copy_share"] = share
        noisy = report._refresh_table(rows)
        assert "| noise |" in noisy and "1 could not be told from the noise" in noisy
        assert noisy.count("noise") == 2
    named = {row["name"]: row for row in rows}
    named["refresh-bf16-minmax-global-stand-alone"]["copy_share"] = 9.0
    assert report._refresh_table(rows) == noisy, "a stand-alone refresh is timed itself"


def test_noise_is_not_judged():
    rows = complete_run()
    (after,) = [row for row in rows if row["name"] == "refresh-f32-minmax-global-after-step"]
    assert after["met"] is True
    after["gbps"] = 100 * next(row["gbps"] for row in rows if row["name"] == "copy")
    run.judge(rows, judged=True)
    assert after["met"] is None
