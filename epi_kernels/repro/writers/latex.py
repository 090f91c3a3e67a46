r"""Tables as LaTeX: \input the file after \usepackage{booktabs}."""

from __future__ import annotations

from collections.abc import Iterable

from epi_kernels.repro.tables.base import Rendered

from .cells import Marks, Parts, lay_out

# Characters with a meaning, those that the default font encoding lacks, and brackets: one after a line's end would be
# read as that line's argument.
ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "±": r"$\pm$", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$",
    "−": "$-$", "–": "--", "→": r"$\to$", "Δ": r"$\Delta$", "δ": r"$\delta$", "θ": r"$\theta$", "τ": r"$\tau$",
    "α": r"$\alpha$", "β": r"$\beta$", "ω": r"$\omega$", "ε": r"$\varepsilon$", "·": r"$\cdot$",
}  # fmt: skip

MARKS = Marks(
    interval=" (${}$ to ${}$)", n=", $n = {}$", paper="{{[}}${}${{]}}", mark=r"\textsuperscript{{{}}}"
)


def escape(text: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in text)


def latex(tables: Iterable[Rendered]) -> str:
    """One table environment each, labelled tab:NAME; tables without rows are left out."""
    return "% needs \\usepackage{booktabs}\n" + "".join(_table(one) for one in tables if one.rows)


def _table(rendered: Rendered) -> str:
    laid = lay_out(rendered)
    notes = [
        *(f"\\textsuperscript{{{number}}} {escape(note)}" for number, note in enumerate(laid.footnotes, 1)),
        *map(escape, rendered.notes),
    ]
    lines = [
        "",
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape(f'{rendered.title}. {laid.caption}'.strip())}}}",
        rf"\label{{tab:{rendered.name}}}",
        rf"\begin{{tabular}}{{{laid.align}}}",
        r"\toprule",
        " & ".join(map(escape, laid.header)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_cell, row)) + r" \\" for row in laid.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip{{\footnotesize\raggedright {note}\par}}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Parts) -> str:
    if not cell.numeric or not cell.main:
        text = escape(cell.main)
    elif cell.sd:
        text = rf"${cell.main} \pm {cell.sd}$"
    else:
        text = f"${cell.main}$"
    return MARKS.after(text, cell)
