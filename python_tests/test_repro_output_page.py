"""The page, the committed bundle and the README's blocks, from made-up manifests."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repro_fakes import make_preset

from epi_kernels.repro import bundle, output, readme, runs, writers
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.page import write_page
from epi_kernels.repro.tables import TABLES
from epi_kernels.repro.tables.base import Cell, Rendered
from epi_kernels.repro.writers.markdown import rows
from python_tests import repro_tables
from python_tests.repro_tables import PRESET, manifests, render

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Fails on a tag that is not closed in its turn; keeps text, anchors, links and sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            for wanted, kept in (("id", self.ids), ("href", self.links), ("src", self.sources)):
                if name == wanted:
                    kept.append(value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    found = manifests()
    write_page(path, render(PRESET, found), found, PRESET, {"retention": "CPI-FT, Table 2"}, "make reproduce")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(source: str) -> Page:
    return Page(source)


def test_the_page_asks_nothing_of_the_network(source, shown):
    assert shown.sources and all(one.startswith("data:image/svg+xml;base64,") for one in shown.sources)
    assert all(link.startswith("#") for link in shown.links)
    assert (
        "url(" not in source and "@import" not in source and "<script" not in source and "<link" not in source
    )
    assert b"</svg>" in base64.b64decode(shown.sources[0].partition(",")[2])


def test_every_link_leads_somewhere_and_every_anchor_is_one(shown):
    assert len(shown.ids) == len(set(shown.ids))
    assert {link.removeprefix("#") for link in shown.links} <= set(shown.ids)


def test_every_row_leads_to_the_runs_behind_it(shown):
    found = manifests()
    assert {f"#run-{key}" for key in found} <= set(shown.links)
    for one in found.values():
        assert one.key in shown.text
    for words in (
        "lr 0.0007, 150 steps",
        "epi (ratio 0.2) on strings",
        "0123456789, 1",
        "cpu A <quick> CPU, cores 2",
    ):
        assert words in shown.text, words


def test_findings_come_first_in_their_order(shown):
    words = (
        "What came out",
        "Held<EPI> keeps more. table",
        "Did not holdnothing. table",
        "Scalea model",
        "CPI-FT, Table 2",
    )
    places = [shown.text.index(one) for one in words]
    assert places == sorted(places)


def test_numbers_notes_and_intervals_are_on_the_page(source, shown):
    assert "full_sft | 100 %" in shown.text and "<td>+25.0 ± 0.0" in source, "all seeds equal: not bold"
    assert "50.3 ± 10.01" in shown.text, "mean, sd and a footnote's number"
    assert "25.5 to 75.2" in shown.text, "2.4841 times the sd on both sides"
    assert "n = 3; below it the 95 % interval" in shown.text and "bold" not in shown.text
    assert '<span class="ours">ours</span>the gain is a difference.' in source


def test_a_difference_whose_interval_excludes_zero_is_bold(tmp_path):
    row = ("r", Cell((5.0, 5.1, 5.2), signed=True), Cell((-5.0, 5.0, 0.0), signed=True))
    source = write_page(
        tmp_path / "p.html", [Rendered("t", "T", ("a", "b", "c"), (row,))], {}, PRESET
    ).read_text()
    assert "<b>+5.1 ± 0.1</b>" in source and source.count("<b>") == 1
    assert "bold: the interval of a difference excludes zero" in source


def test_a_page_without_findings_or_runs_says_so(tmp_path):
    page = Page(
        write_page(tmp_path / "p.html", [Rendered("t", "T", ("a",), (("r",),))], {}, PRESET).read_text()
    )
    assert "The tables state no findings." in page.text


def test_files_of_a_sweep(tmp_path):
    tables = render(PRESET, manifests())
    names = ["tables.md", "tables.csv", "tables.tex", "figures/retention-by-method.png"]
    assert writers.write_tables(tmp_path, tables) == [tmp_path / name for name in names]
    assert (tmp_path / names[-1]).read_bytes().startswith(b"\x89PNG")
    assert "![What is left](figures/retention-by-method.png)" in (tmp_path / "tables.md").read_text()


# ---------------------------------------------------------------- bundle


def packed(path: Path, series=()) -> Path:
    return bundle.write_bundle(bundle.bundle(PRESET, ["retention", "memory"], manifests(), series), path)


def test_a_bundle_gives_back_what_was_put_in(tmp_path):
    found = bundle.read_bundle(packed(tmp_path / "b.json", None))
    assert (found.preset, found.tables) == (PRESET, ("retention", "memory"))
    assert found.manifests.keys() == manifests().keys()
    for key, one in manifests().items():
        back = found.manifests[key]
        assert back.model_copy(update={"series": {}}) == one.model_copy(update={"series": {}})
        assert back.series["loss"] == [0.123457, {"step": 3, "loss": 0.333333}]


def test_a_bundle_is_compact_and_keeps_only_the_series_asked_for(tmp_path):
    path = packed(tmp_path / "b.json", ["drift"])
    data = json.loads(path.read_text())
    assert all(row["series"].keys() == {"drift"} for row in data["manifests"])
    assert len(data["origins"]) == 1
    whole = sum(len(one.model_dump_json(exclude={"series"})) for one in manifests().values())
    assert len(packed(path).read_text()) < whole / 2


def test_what_only_looks_equal_is_kept_apart():
    shared = [
        repro_tables.manifest(runs.Base(model={"config": {"model_type": "llama", "x": x}}), 0, {})  # pyright: ignore
        for x in (1, True, 1.0)
    ]
    data = json.loads(json.dumps(bundle.bundle(PRESET, [], {one.key: one for one in shared})))
    assert bundle.unbundle(data).manifests.keys() == {one.key for one in shared}


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ('{"schema": 2}', "it has schema 2, this version reads 1"),
        ('{"schema": 1}', "does not hold what this version reads (KeyError: 'manifests')"),
        ('{"schema": 1, "manifests": [{"origin": 0}], "origins": []}', "IndexError"),
        ('{"schema": 1, "manifests": [], "tables": [], "preset": {"name": "x"}}', "ValidationError"),
    ],
)
def test_a_bundle_of_another_version_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(ReproError, match=re.escape(words)) as error:
        bundle.read_bundle(path)
    assert str(path) in str(error.value)


# ---------------------------------------------------------------- README

README = """# title

<!-- reproduce:begin findings -->
old
<!-- reproduce:end findings -->

between

<!-- reproduce:begin retention -->
<!-- reproduce:end retention -->

<!-- reproduce:begin retention-findings -->
old
<!-- reproduce:end retention-findings -->

<!-- bench:begin cpu -->
not ours
<!-- bench:end cpu -->

<!-- reproduce:begin -->
<!-- reproduce:end -->

after
"""
PLOT = "bench/plots/reproduce/retention-by-method.png"


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


def test_the_readme_is_written_once_and_then_up_to_date(page, tmp_path):
    results = packed(tmp_path / "b.json")
    assert readme.stale(page, results, render) == [PLOT, "README.md"]
    assert page.read_text() == README, "looking writes nothing"
    assert readme.write_readme(page, results, render) == [PLOT, "README.md"]
    text = page.read_text()
    assert readme.stale(page, results, render) == [] == readme.write_readme(page, results, render)
    assert page.read_text() == text
    drawn = (tmp_path / PLOT).read_bytes()
    (tmp_path / PLOT).unlink()
    assert readme.write_readme(page, results, render) == [PLOT]
    assert (tmp_path / PLOT).read_bytes() == drawn, "no date, no name of a program"

    assert text.startswith("# title\n\n<!-- reproduce:begin findings -->\n- **Held.** \\<EPI> keeps more.\n")
    assert text.count("- **Held.** \\<EPI> keeps more.\n") == 3, "of all tables, of one, and in the whole"
    assert "\n\nbetween\n\n" in text and "\nnot ours\n" in text and text.endswith("\n\nafter\n")
    assert "Preset `tiny`, 3 seeds, 6 runs in 2.0 minutes" in text
    assert "A <quick> CPU, 2 cores; torch 2.13.0; commit 0123456789; 2031-02-03." in text
    assert f"![What is left]({PLOT})" in text and "| ours | 8.125 |" in text


def test_what_was_not_committed_is_said(tmp_path):
    found = manifests()
    (name, one), *_ = found.items()
    changed = found | {name: one.model_copy(update={"dirty": True})}
    told = readme.provenance(bundle.unbundle(bundle.bundle(PRESET, ["retention"], changed)))
    assert "commit 0123456789, 0123456789 with uncommitted changes;" in told
    page = write_page(tmp_path / "p.html", render(PRESET, changed), changed, PRESET).read_text()
    assert "commit 0123456789 with uncommitted changes;" in page and "commit 0123456789;" in page


def test_rows_are_tables_without_their_notes():
    text = rows(*render(PRESET, manifests()))
    assert (
        text.startswith("**What is left of A & B**\n\n| method |") and "**Memory**\n\n| optimizer |" in text
    )
    assert "ours" not in text.replace("| ours |", "") and "a difference" not in text
    assert text.count("ean ± sd over seeds") == 1


def test_a_table_more_leaves_those_that_are_there_on_the_page(tmp_path):
    preset = make_preset()
    done = {runs.key(run) for name in ("cpift-1", "drift") for run in TABLES[name].runs(preset)}
    store: Any = SimpleNamespace(finished=lambda run, with_weights: runs.key(run) in done)
    names = ["epi-ratio"]
    assert output.with_earlier(tmp_path, preset, names, store) == names, "nothing was made before"
    results = tmp_path / output.RESULTS
    earlier = [
        "cpift-1",
        "memory",
        "drift",
        "vision",
        "no longer a table",
    ]  # memory's runs are not there, vision has no plan
    results.write_text(json.dumps({"tables": earlier}))
    assert output.with_earlier(tmp_path, preset, names, store) == ["cpift-1", "drift", "epi-ratio"]
    assert output.with_earlier(tmp_path, preset, ["drift"], store) == ["cpift-1", "drift"]
    for broken in ("", "[]", '{"tables": 3}'):
        results.write_text(broken)
        assert output.with_earlier(tmp_path, preset, names, store) == names


def test_a_number_typed_by_hand_is_seen(page, tmp_path):
    results = packed(tmp_path / "b.json")
    readme.write_readme(page, results, render)
    page.write_text(page.read_text().replace("50.3 ± 10.0", "90.3 ± 10.0"))
    assert readme.stale(page, results, render) == ["README.md"]


def test_new_data_make_readme_and_plots_stale(page, tmp_path):
    results = packed(tmp_path / "b.json")
    readme.write_readme(page, results, render)
    results.write_text(results.read_text().replace('"strings":50.0', '"strings":51.0'))
    assert readme.stale(page, results, render) == [PLOT], (
        "this score is in no table, but might be in the plot"
    )


def test_without_a_bundle_the_readme_says_so(page, tmp_path):
    assert readme.write_readme(page, tmp_path / "none.json", render) == ["README.md"]
    assert page.read_text().count(readme.NOTHING) == 4
    assert readme.stale(page, tmp_path / "none.json", render) == []


def test_markers_that_do_not_fit_are_errors(page, tmp_path):
    results = packed(tmp_path / "b.json")
    page.write_text("<!-- reproduce:begin typo -->\n<!-- reproduce:end typo -->\n")
    with pytest.raises(
        ValueError, match="marks a block 'typo'; there are provenance, findings, rows, retention, memory"
    ):
        readme.write_readme(page, results, render)
    page.write_text("<!-- reproduce:begin -->\n<!-- reproduce:end memory -->\n")
    with pytest.raises(ValueError, match="lacks its reproduce:end"):
        readme.write_readme(page, results, render)


def test_a_cell_may_hold_a_tag():
    tables = [Rendered("t", "<i>", ("a", "b"), (("<script>", Cell(text="&")),))]
    assert "\\<script>" in writers.markdown(tables[0])
