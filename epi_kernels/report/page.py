"""A self-contained HTML page: a title and sections of text, tables and figures.

    build("out.html", "My run", [
        Section("Loss", [Text("What fell and what rose."), Figure(figures.lines(...), "Loss over steps.")]),
        Section("Numbers", [Table(["method", "loss"], [["AdamW", "1.20"], ["EPI", "1.05"]])]),
    ])

The page makes no request: the style sheet is inline and every figure is a data URI.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from epi_kernels.files import write_whole


@dataclass
class Text:
    """A paragraph. Plain text, escaped; blank lines separate paragraphs."""

    text: str

    def html(self) -> str:
        return "".join(f"<p>{html.escape(part)}</p>" for part in self.text.split("\n\n") if part.strip())


@dataclass
class Note(Text):
    """A paragraph that must not be overlooked (a warning, a price)."""

    def html(self) -> str:
        return f'<div class="note">{super().html()}</div>'


@dataclass
class Code:
    """Preformatted text, for commands."""

    text: str

    def html(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


def scrolled(head: str, body: str, caption: str = "", kind: str = "") -> str:
    """A table as wide as it likes. ``head``, ``body``: HTML of its cells and of its rows; ``kind``: what a style sheet
    knows it by."""
    named = f' class="{kind}"' if kind else ""
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{named}>{told}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


@dataclass
class Table:
    """Rows of cells (anything with a `str`). Cells after the first column are set flush right."""

    headers: Sequence[object]
    rows: Iterable[Sequence[object]]
    caption: str = ""

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in self.headers)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return scrolled(head, body, self.caption)


@dataclass
class Figure:
    """A figure as SVG text (see `figures`) or PNG bytes, with a caption that also serves readers who cannot see it."""

    image: str | bytes
    caption: str = ""

    def html(self) -> str:
        kind, data = ("svg+xml", self.image.encode()) if isinstance(self.image, str) else ("png", self.image)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        caption = html.escape(self.caption)
        return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


@dataclass
class Tiles:
    """A row of headline numbers: (label, value, small print)."""

    tiles: Iterable[tuple[str, str, str]]

    def html(self) -> str:
        cells = (
            f'<div class="tile"><span>{html.escape(label)}</span><b>{html.escape(value)}</b><small>{html.escape(small)}</small></div>'
            for label, value, small in self.tiles
        )
        return f'<div class="tiles">{"".join(cells)}</div>'


class Block(Protocol):
    """What a section is made of: those above, and whatever another page adds."""

    def html(self) -> str: ...


@dataclass
class Section:
    """A heading and the blocks under it; a bare string is a `Text`."""

    heading: str
    blocks: Sequence[Block | str] = field(default_factory=list)

    def html(self) -> str:
        blocks = (Text(block) if isinstance(block, str) else block for block in self.blocks)
        return f"<section><h2>{html.escape(self.heading)}</h2>{''.join(block.html() for block in blocks)}</section>"


STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--card:#fff;--page:#f5f6f8;--accent:#0072b2}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.2rem;margin:0 0 .8rem}
.subtitle{color:var(--soft);margin:0 0 1.8rem;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.3rem 1.5rem;margin:0 0 1.2rem}
p{margin:0 0 .8rem;max-width:46rem}figure{margin:0 0 1rem}figure:last-child{margin-bottom:0}
img{display:block;width:100%;height:auto}figcaption{color:var(--soft);font-size:.88rem;margin-top:.4rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;margin:.2rem 0 1rem}
caption{text-align:left;color:var(--soft);font-size:.88rem;padding-bottom:.4rem}
th,td{padding:.38rem .9rem .38rem 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:600;color:var(--soft)}th:first-child,td:first-child{text-align:left}
pre{background:#f0f2f5;border-radius:6px;padding:.7rem .9rem;overflow-x:auto;font-size:.85rem;margin:0 0 .8rem}
.note{border-left:4px solid #d55e00;background:#fdf3ec;padding:.7rem 1rem .1rem;border-radius:0 6px 6px 0;margin:0 0 1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:0 0 1rem}
.tile{border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem;display:flex;flex-direction:column}
.tile span,.tile small{color:var(--soft);font-size:.82rem}.tile b{font-size:1.15rem;font-variant-numeric:tabular-nums}
@media (max-width:40rem){main{padding:1.2rem .6rem 2rem}section{padding:1rem .8rem}h1{font-size:1.5rem}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


def render(title: str, sections: Iterable[Section], subtitle: str = "", style: str = "") -> str:
    """The page as HTML text; ``style``: CSS after the page's own."""
    body = "".join(section.html() for section in sections)
    lead = f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{lead}{body}</main></body></html>\n"
    )


def build(
    path: str | os.PathLike[str], title: str, sections: Iterable[Section], subtitle: str = "", style: str = ""
) -> Path:
    """Writes the page to `path` (all of it or nothing); returns the path."""
    path = Path(path)
    write_whole(path, render(title, sections, subtitle, style))
    return path
