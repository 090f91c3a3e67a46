"""All tables of a reproduction as one self-contained HTML page, every row linked to the runs it came from."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epi_kernels.report.page import Block, Code, Figure, Note, Section, build, scrolled
from epi_kernels.repro.describe import describe
from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.runs import key as key_of
from epi_kernels.repro.runs import parents
from epi_kernels.repro.tables.base import Manifests, Rendered
from epi_kernels.repro.writers.cells import Parts, lay_out
from epi_kernels.repro.writers.findings import OURS, ordered
from epi_kernels.repro.writers.plots import svg

STYLE = """
.result td:first-child,.result th:first-child{position:sticky;left:0;background:var(--card);white-space:normal;min-width:8rem}
.result td small,.notes{color:var(--soft);font-size:.82rem}.result td small{display:block}.paper{color:var(--accent)}
.runs a{font-size:.8rem;margin-left:.35rem}.notes{padding-left:1.2rem;margin:0 0 1rem;max-width:46rem}
.notes li{margin:0 0 .3rem}.ours{border:1px solid var(--line);border-radius:4px;padding:0 .3rem;margin-right:.3rem}
.log td{text-align:left;white-space:normal;vertical-align:top;font-size:.82rem}.log th{text-align:left}
.log td:first-child{white-space:nowrap;font-family:monospace}tr:target td,li:target{background:#fff3c4}
h3{font-size:1rem;margin:0 0 .3rem}h2[id]{scroll-margin-top:1rem}
@media print{.scroll{overflow:visible}.result td:first-child{position:static}}
"""


def write_page(
    path: Path,
    tables: Sequence[Rendered],
    manifests: Manifests,
    preset: Preset,
    sources: Mapping[str, str] | None = None,
    command: str = "",
) -> Path:
    """Writes the page, whole or not at all; returns its path.

    ``sources``: name of a table -> what it reproduces ("CPI-FT, Table 2"). ``command``: what makes it again. OSError.
    """
    sources = sources or {}
    log = _Log(manifests)
    sections = [
        Section("What came out", [_Findings(tables)] if any(one.findings for one in tables) else [_NONE]),
        *(_section(one, sources.get(one.name, ""), log) for one in tables),
        Section("The runs", [log]),
        Section("Where they were made", [_Origins(log.origins), *([Code(command)] if command else [])]),
    ]
    count = len(preset.seeds)
    subtitle = f"Preset {preset.name}, {count} seed{'s' if count > 1 else ''}, {len(manifests)} runs."
    return build(path, "EPI and CPI-FT, reproduced", sections, subtitle, STYLE)


_NONE = Note("The tables state no findings.")


def _section(rendered: Rendered, source: str, log: _Log) -> Section:
    blocks: list[Block | str] = [_Top(rendered.name, source)]
    if rendered.rows:
        blocks.append(_Result(rendered, log))
    blocks.append(_Notes(rendered))
    blocks += [Figure(svg(one), one.caption) for one in rendered.figures]
    return Section(rendered.title, blocks)


@dataclass
class _Top:
    """What links to a table lead to, and what the table reproduces."""

    name: str
    source: str

    def html(self) -> str:
        return f'<p id="table-{html.escape(self.name)}">{html.escape(self.source)}</p>'


@dataclass
class _Findings:
    """What held, what did not, at which scale; each with a link to its table."""

    tables: Sequence[Rendered]

    def html(self) -> str:
        table_of = {finding: one.name for one in reversed(self.tables) for finding in one.findings}
        origin = {finding.partition(": ")[2]: name for finding, name in table_of.items()} | table_of
        parts = []
        for kind, sentences in ordered(finding for one in self.tables for finding in one.findings):
            items = "".join(
                f'<li>{html.escape(one)} <a href="#table-{html.escape(origin[one])}">table</a></li>'
                for one in sentences
            )
            parts.append(f"<h3>{kind}</h3><ul>{items}</ul>")
        return "".join(parts)


@dataclass
class _Result:
    """A table of numbers; its last column names the runs of a row."""

    rendered: Rendered
    log: _Log

    def html(self) -> str:
        laid = lay_out(self.rendered, below=True)
        linked = bool(self.rendered.runs)
        head = "".join(f"<th>{html.escape(one)}</th>" for one in laid.header) + (
            "<th>runs</th>" if linked else ""
        )
        body = ""
        for index, row in enumerate(laid.rows):
            cells = "".join(f"<td>{self._cell(one)}</td>" for one in row)
            if linked:
                keys = self.rendered.runs[index] if index < len(self.rendered.runs) else ()
                cells += f'<td class="runs">{"".join(map(self.log.link, keys))}</td>'
            body += f"<tr>{cells}</tr>"
        return scrolled(head, body, laid.caption, "result")

    def _cell(self, cell: Parts) -> str:
        text = html.escape(cell.main) + (f" ± {cell.sd}" if cell.sd else "")
        if cell.excludes_zero and cell.difference:
            text = f"<b>{text}</b>"
        if cell.n is not None:
            text += f", n = {cell.n}"
        if cell.paper:
            text += f' <span class="paper">[{cell.paper}]</span>'
        if cell.mark is not None:
            text += f'<sup><a href="#{_anchor(self.rendered, cell.mark)}">{cell.mark}</a></sup>'
        if cell.interval:
            text += f"<small>{cell.interval[0]} to {cell.interval[1]}</small>"
        return text


@dataclass
class _Notes:
    """Footnotes by number, then what holds for the whole table."""

    rendered: Rendered

    def html(self) -> str:
        laid = lay_out(self.rendered)
        numbered = "".join(
            f'<li id="{_anchor(self.rendered, number)}">{html.escape(note)}</li>'
            for number, note in enumerate(laid.footnotes, 1)
        )
        plain = "".join(f"<li>{self._note(note)}</li>" for note in self.rendered.notes)
        return (f'<ol class="notes">{numbered}</ol>' if numbered else "") + (
            f'<ul class="notes">{plain}</ul>' if plain else ""
        )

    def _note(self, note: str) -> str:
        if note.startswith(OURS):
            return f'<span class="ours">ours</span>{html.escape(note.removeprefix(OURS))}'
        return html.escape(note)


def _anchor(rendered: Rendered, number: int) -> str:
    return html.escape(f"note-{rendered.name}-{number}")


class _Log:
    """Every manifest as a row that others link to."""

    def __init__(self, manifests: Manifests) -> None:
        self.manifests = manifests
        self.origins: list[dict[str, Any]] = []

    def link(self, key: str) -> str:
        manifest = self.manifests.get(key)
        if manifest is None:
            return f" {html.escape(key)}"
        return f'<a href="#run-{key}" title="{key}">{manifest.seed}</a>'

    def html(self) -> str:
        head = "".join(
            f"<th>{one}</th>"
            for one in ("run", "what", "after", "seed", "scores", "seconds", "made at", "finished")
        )
        rows = "".join(self._row(key, one) for key, one in self.manifests.items())
        return (
            "<p>In the tables a run is named by its seed. A run's key is the hash of its whole description, which its "
            "manifest states.</p>" + scrolled(head, rows, kind="log")
        )

    def _row(self, key: str, manifest: Manifest) -> str:
        scores = ", ".join(f"{kind} {score:.4g}" for kind, score in manifest.scores.items())
        before = [key_of(one) for one in parents(manifest.run)]
        after = " ".join(
            f'<a href="#run-{one}">{one[:6]}</a>' if one in self.manifests else one[:6] for one in before
        )
        origin = self.origin(manifest)
        cells = [
            html.escape(manifest.key),
            html.escape(describe(manifest.run)),
            after,
            str(manifest.seed),
            html.escape(scores),
            f"{manifest.seconds:.1f}",
            f'<a href="#origin-{origin}">{html.escape((manifest.commit or "unknown")[:10])}, {origin}</a>',
            html.escape(manifest.finished),
        ]
        return f'<tr id="run-{key}">{"".join(f"<td>{one}</td>" for one in cells)}</tr>'

    def origin(self, manifest: Manifest) -> int:
        """Number, from 1, of the commit, versions and machine that made a run."""
        found = {
            "commit": manifest.source,
            "versions": manifest.versions,
            "machine": manifest.machine,
        }
        if found not in self.origins:
            self.origins.append(found)
        return self.origins.index(found) + 1


@dataclass
class _Origins:
    """Commit, versions and machine, once for all runs that share them."""

    origins: Sequence[dict[str, Any]]

    def html(self) -> str:
        items = "".join(
            f'<li id="origin-{number}">commit {html.escape(one["commit"])}; {_pairs(one["machine"])}; '
            f"{_pairs(one['versions'])}</li>"
            for number, one in enumerate(self.origins, 1)
        )
        return f'<ol class="notes">{items}</ol>'


def _pairs(facts: Mapping[str, Any]) -> str:
    return html.escape(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
