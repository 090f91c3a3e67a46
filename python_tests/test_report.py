"""The page of a run: what it shows, that it asks nothing of the network, and what it refuses."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
from html.parser import HTMLParser

import pytest

from epi_kernels.finetune import log
from epi_kernels.report import command as report
from epi_kernels.report import figures, page, sections
from epi_kernels.report.figures import Series
from python_tests.tiny_model import command

LAYERS = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


def refresh(step, isolated, entered, released):
    rows = [
        {
            "name": name,
            "elements": 100 * (i + 1),
            "isolated": i + step,
            "entered": i,
            "released": 0,
            "jaccard": 0.5,
            "nonfinite": 0,
        }
        for i, name in enumerate(LAYERS)
    ]
    overlap = (isolated - entered) / (isolated + released)
    counts = {"isolated": isolated, "entered": entered, "released": released, "ties": 0, "nonfinite": 0}
    bytes_ = {
        "exp_avg": 2400,
        "exp_avg_sq": 2400,
        "importance": 0,
        "isolation_mask": 75,
        "persistent_mask": 0,
        "other": 12,
        "total": 4887,
    }
    return {
        "event": "refresh",
        "step": step,
        "ratio": 0.01,
        "threshold": 0.25,
        "jaccard": overlap,
        **counts,
        "layers": rows,
        "state_bytes": bytes_,
    }


def events(steps=20, retain=True, refreshes=(5, 10), finished=True, name="isolation", **options):
    start = {
        "event": "start", "step": 0, "optimizer": name, "parameters": 600, "dtype": "float32", "steps": 20,
        "options": {"isolation_ratio": 0.01, "mask_interval": 5, "protect": None, "lr": 1e-3, **options},
        "environment": {"torch": "2.13"}, "memory": {"parameters": 600, "adamw": 4800, "ours": 4875, "epi_as_published": 7800},
        "data": {"train": {"examples": 9, "tokens": 90, "answer_tokens": 30, "truncated": 1, "dropped": 2, "unlearned_turns": 0}},
    }  # fmt: skip
    result = [
        start,
        {"event": "eval", "step": 0, "validation_loss": 3.25, "retain_loss": 1.5 if retain else None},
    ]
    for step in range(1, steps + 1):
        result.append({"event": "step", "step": step, "loss": 3 - 0.1 * step, "lr": 1e-3, "grad_norm": 1.0})
        if step in refreshes:
            result.append(refresh(step, 6, 6, 0) if step == refreshes[0] else refresh(step, 6, 2, 2))
    result.append(
        {"event": "eval", "step": steps, "validation_loss": 1.125, "retain_loss": 1.75 if retain else None}
    )
    if finished:
        result.append({"event": "end", "step": steps, "state_bytes": {"total": 4887, "exp_avg": 2400}})
    return result


def write(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


class Reader(HTMLParser):
    """Headings, text, addresses and whether every tag is closed."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.text, self.addresses, self.images = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action"):
                self.addresses.append(value)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


def read(folder, *more):
    assert command(report, folder, *more) == 0
    return Reader((folder / "report.html").read_text())


HEADINGS = [
    "Outcome",
    "Training and validation loss",
    "Old-data loss",
    "What was isolated",
    "Optimizer memory",
    "Data and settings",
]


def test_a_run_has_every_section_and_asks_nothing_of_the_network(tmp_path):
    found = read(write(tmp_path / "run", events()))
    assert found.headings == ["Fine-tuning with isolation: run", *HEADINGS]
    assert len(found.images) == 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.addresses)
    html = (tmp_path / "run" / "report.html").read_text()
    assert "@import" not in html and "url(" not in html and "<script" not in html
    for image in found.images:
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        assert svg.startswith("<?xml") and svg.rstrip().endswith("</svg>")
        assert not re.search(r'(?:href|src)="(?!#|data:)', svg)
        assert image["alt"]


def test_numbers_of_the_log_are_on_the_page(tmp_path):
    text = " ".join(read(write(tmp_path / "run", events())).text)
    assert "3.2500 → 1.1250" in text  # validation loss
    assert "1.5000 → 1.7500" in text and "+0.2500" in text  # old data
    assert "1.00%" in text  # isolated: 6 of 600
    assert "13.000" in text and "8.000" in text and "8.145" in text  # bytes a parameter
    assert "0.500" in text  # Jaccard of the second refresh, (6 - 2) / (6 + 2)
    assert "not finished" not in text


def test_a_comparison_shows_both_optimizers(tmp_path):
    folder = write(tmp_path / "run", events())
    write(folder / "adamw", events(refreshes=(), name="adamw"))
    text = " ".join(read(folder).text)
    assert "MaskedEMAAdamW" in text and "torch.optim.AdamW" in text


def test_what_a_log_lacks_is_left_out_or_said(tmp_path):
    found = read(write(tmp_path / "run", events(retain=False, refreshes=(), finished=False)))
    assert "Old-data loss" not in found.headings and "What was isolated" not in found.headings
    text = " ".join(found.text)
    assert "nothing was isolated" in text and "not finished" in text
    only_start = read(write(tmp_path / "short", events()[:1]))
    assert "Outcome" in only_start.headings


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    folder = write(tmp_path / "run", events())
    with open(folder / "log.jsonl", "ab") as file:
        file.write('{"event": "protect", "source": "ü'.encode()[:-1])  # in the middle of a character, even
    assert "Outcome" in read(folder).headings


def test_only_a_line_feed_ends_a_line(tmp_path):
    """A log is UTF-8: a name may hold what str.splitlines takes for the end of a line."""
    records = events(protect="odd\u2028name\x85.safetensors")
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    assert log.read(folder / "log.jsonl") == records
    assert "Outcome" in read(folder).headings


def test_values_that_are_no_numbers_do_not_break_the_page(tmp_path):
    records = events()
    for record in records:
        if record["event"] == "step" and record["step"] > 10:
            record["loss"] = "nan"
        if record["event"] == "refresh":
            record["threshold"] = {"a": 0.5, "b": "inf"} if record["step"] == 5 else "inf"
        if record["event"] == "eval" and record["step"] > 10:
            record["validation_loss"], record["retain_loss"] = "nan", "inf"
    assert "What was isolated" in read(write(tmp_path / "run", records)).headings


def test_names_are_escaped(tmp_path):
    text = read(write(tmp_path / "a<b>&c", events(protect="<script>alert(1)</script>")))
    assert "Fine-tuning with isolation: a<b>&c" in "".join(text.text)
    assert "<script" not in (tmp_path / "a<b>&c" / "report.html").read_text()


def test_the_page_can_be_written_elsewhere_and_repeats(tmp_path, capsys):
    folder = write(tmp_path / "run", events())
    assert command(report, folder, "--out", tmp_path / "one.html") == 0
    assert command(report, folder, "--out", tmp_path / "two.html") == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert capsys.readouterr().out.split() == [str(tmp_path / "one.html"), str(tmp_path / "two.html")]
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl"]


def test_a_full_disk_is_said_with_the_page_that_has_no_room(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = write(tmp_path / "run", events())
    monkeypatch.setattr(os, "fsync", full)
    assert command(report, folder) == 1
    assert capsys.readouterr().err == f"epi-kernels report: no space left for {folder / 'report.html'}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl"]


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "no log.jsonl"),
        ("", "not the log"),
        ("[]\n", "log.jsonl:1"),
        ('{"event": "step"}\n', "first line must be"),
        ("x\ny\n", ":1: "),
        ('{"event": "start"}\n', "its log has no 'options'"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, capsys, content, fault):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert command(report, tmp_path) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_builder_serves_other_pages(tmp_path):
    blocks = [
        "First.\n\nSecond.",
        page.Note("The price."),
        page.Code("a < b"),
        page.Table(["m", "n"], [["x", 1]], "Cap."),
        page.Figure(b"\x89PNG", "dot"),
    ]
    path = page.build(tmp_path / "p.html", "T & t", [page.Section("One", blocks)], "sub")
    found = Reader(path.read_text())
    assert found.headings == ["T & t", "One"]
    text = "".join(found.text)
    for part in ("First.", "Second.", "The price.", "a < b", "Cap.", "sub"):
        assert part in text
    assert found.addresses == ["data:image/png;base64,iVBORw=="]
    assert [one.name for one in tmp_path.iterdir()] == ["p.html"]


def test_smoothing_does_not_look_ahead():
    assert sections.smooth([4.0, 2.0, 6.0, 0.0], 2) == [4.0, 3.0, 4.0, 3.0]
    assert sections.smooth([], 5) == []


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.lines([]),
        lambda: figures.lines([Series("a", [1], [2])], marks=[1]),
        lambda: figures.lines(
            [Series("a", [1, 2], [2, 3], yerr=[0.1, 0.2]), Series("b", [1], [1])], ylim=(0, 1)
        ),
        lambda: figures.points([Series("a", [1], [2], xerr=[0.1], yerr=[0.2])], "B", "A"),
        lambda: figures.heatmap([[None, 0.0]], ["layer"], [1, 2]),
        lambda: figures.bars(["x"], [("a", [1.0]), ("b", [2.0])], errors=[[0.1], None]),
    ],
    ids=["empty", "one point", "bands", "points", "zeros", "bars"],
)
def test_figures_of_awkward_data(draw):
    svg = draw()
    assert "</svg>" in svg
    assert svg == draw()
