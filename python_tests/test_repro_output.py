"""What tables say: statistics against known numbers, each format to the character, the papers' own numbers."""

from __future__ import annotations

import csv
import io
import math

import pytest

from epi_kernels.repro import published_values as published
from epi_kernels.repro import statistics, writers
from epi_kernels.repro.statistics import Frontiers, Interval, paired, summary, t_quantile
from epi_kernels.repro.tables.base import Cell, Rendered
from epi_kernels.scores import ABOVE, BELOW, INSIDE, Point

# ---------------------------------------------------------------- statistics


# Abramowitz and Stegun's table 26.10, to more digits from R's qt.
@pytest.mark.parametrize(
    "probability, df, quantile",
    [
        (0.975, 1, 12.7062047362),
        (0.975, 2, 4.30265272975),
        (0.975, 3, 3.18244630528),
        (0.975, 4, 2.77644510520),
        (0.975, 9, 2.26215716280),
        (0.975, 30, 2.04227245630),
        (0.95, 5, 2.01504837333),
        (0.995, 7, 3.49948329735),
        (0.025, 4, -2.77644510520),
        (0.5, 4, 0.0),
    ],
)
def test_quantiles_of_t(probability, df, quantile):
    assert t_quantile(probability, df) == pytest.approx(quantile, abs=1e-10)


def test_many_degrees_of_freedom_are_nearly_normal():
    assert t_quantile(0.975, 10_000) == pytest.approx(1.959963984540, abs=3e-4)


@pytest.mark.parametrize("probability, df", [(0, 3), (1, 3), (0.9, 0)])
def test_no_such_quantile(probability, df):
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(probability, df)


def test_summary():
    found = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451052 * math.sqrt(2.5 / 5)
    assert found[:3] == (3.0, math.sqrt(2.5), 5)
    assert found.interval == pytest.approx((3 - half, 3 + half)) and found.excludes_zero
    assert summary([7.0]) == (7.0, 0.0, 1, None) and not summary([7.0]).excludes_zero
    assert not summary([-1.0, 1.0]).excludes_zero
    assert summary([2.0, 2.0]).interval == Interval(2.0, 2.0)
    lost = summary([1.0, math.inf])
    assert math.isnan(lost.mean) and lost.n == 2 and not lost.excludes_zero
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_paired_differences_see_what_the_seeds_share():
    ours, theirs = [10.0, 50.0, 90.0], [8.0, 47.5, 88.5]
    assert paired(ours, theirs).mean == pytest.approx(2.0) and paired(ours, theirs).excludes_zero
    assert not summary(ours).excludes_zero
    with pytest.raises(ValueError, match="3 and 2 values cannot be paired"):
        paired(ours, theirs[:2])


def test_the_interpolated_frontier_holds_what_full_fine_tuning_cannot_reach():
    frontiers = Frontiers(
        full=(Point(50, 40), Point(90, 10)),
        interpolated=(Point(30, 95), Point(60, 60), Point(20, 10)),  # the last is beaten by the model before
        before=Point(20, 100),
    )
    run = Point(50, 70)
    assert frontiers.over_full(run) == (30, 40, INSIDE)
    assert frontiers.over_interpolated(run) == (pytest.approx(-5 / 3), pytest.approx(215 / 3), INSIDE)
    # Between the model before and the first interpolation, models were made: no estimate.
    assert frontiers.over_full(Point(25, 90)).where == BELOW
    assert frontiers.over_interpolated(Point(25, 90)) == (-7.5, 97.5, INSIDE)
    assert frontiers.over_interpolated(Point(95, 5)) == (-5, 10, ABOVE)


def test_average_normalises_every_task_to_ten():
    assert statistics.normalised_average({"a": 50.0, "b": 7.0}, {"a": 100, "b": 10}) == 6.0


# ---------------------------------------------------------------- writers

SMALL = Rendered(
    "small", "Scores_of A & B", ("method", "A, %", "gain|B", "x"),
    (
        ("full_sft", Cell((50.0, 52.0, 54.0), paper=48.25), Cell((0.01, -0.01, -0.03), signed=True), Cell(text="-")),
        ("_EPI_ [p*]", Cell((70.0, 71.0, 72.0), digits=0, note="first"),
         Cell((10.0, 12.0, 14.0), signed=True, paper=13, note="second"), Cell(paper=6.58, note="first")),
    ),
    notes=("What 5 % is.",),
)  # fmt: skip

# t(0.975, 2) / sqrt(3) = 2.4841 times the sd.
MARKDOWN = r"""### Scores_of A & B

| method | A, % | gain\|B | x |
| --- | ---: | ---: | ---: |
| full_sft | 52.0 ± 2.0 [48.25] | 0.0 ± 0.0 (-0.1 to 0.0) | - |
| \_EPI\_ [p\*] | 71 ± 1<sup>1</sup> | +12.0 ± 2.0 (+7.0 to +17.0) [+13.0]<sup>2</sup> | [6.58]<sup>1</sup> |

Mean ± sd over seeds, n = 3; in parentheses the 95 % interval of the mean (Student's t); in brackets what the paper prints.

- <sup>1</sup> first
- <sup>2</sup> second
- What 5 % is.
"""

LATEX = r"""% needs \usepackage{booktabs}

\begin{table}[t]
\centering
\caption{Scores\_of A \& B. Mean $\pm$ sd over seeds, n = 3; in parentheses the 95 \% interval of the mean (Student's t); in brackets what the paper prints.}
\label{tab:small}
\begin{tabular}{lrrr}
\toprule
method & A, \% & gain\textbar{}B & x \\
\midrule
full\_sft & $52.0 \pm 2.0$ {[}$48.25${]} & $0.0 \pm 0.0$ ($-0.1$ to $0.0$) & - \\
\_EPI\_ {[}p*{]} & $71 \pm 1$\textsuperscript{1} & $+12.0 \pm 2.0$ ($+7.0$ to $+17.0$) {[}$+13.0${]}\textsuperscript{2} & {[}$6.58${]}\textsuperscript{1} \\
\bottomrule
\end{tabular}
\par\smallskip{\footnotesize\raggedright \textsuperscript{1} first\par}
\par\smallskip{\footnotesize\raggedright \textsuperscript{2} second\par}
\par\smallskip{\footnotesize\raggedright What 5 \% is.\par}
\end{table}
"""


def test_markdown():
    assert writers.markdown(SMALL) == MARKDOWN


def test_latex():
    assert writers.latex([SMALL, Rendered("figure-only", "No table")]) == LATEX


def test_csv_has_every_number_unrounded():
    rows = list(csv.DictReader(io.StringIO(writers.csv_text([SMALL]))))
    assert len(rows) == 6 and {row["table"] for row in rows} == {"small"}
    first, third, gain, printed = rows[0], rows[2], rows[4], rows[5]
    assert (first["row"], first["column"], first["paper"], first["values"]) == (
        "full_sft",
        "A, %",
        "48.25",
        "50.0 52.0 54.0",
    )
    found = summary([50.0, 52.0, 54.0])
    assert found.interval is not None
    assert [float(first[name]) for name in ("mean", "sd", "n")] == [52.0, 2.0, 3.0]
    assert [float(first[name]) for name in ("ci_low", "ci_high")] == list(found.interval)
    assert (third["text"], third["mean"], third["values"]) == ("-", "", "")
    assert (gain["row"], gain["column"], gain["note"]) == ("_EPI_ [p*]", "gain|B", "second")
    assert (printed["mean"], printed["paper"], printed["note"]) == ("", "6.58", "first")


def one_row(*cells: Cell) -> Rendered:
    return Rendered("t", "T", ("row", *"abc"[: len(cells)]), (("r", *cells),))


def test_n_is_told_per_cell_where_cells_differ():
    text = writers.markdown(one_row(Cell((1.0, 2.0)), Cell((3.0,))))
    assert "| r | 1.5 ± 0.7, n = 2 | 3.0, n = 1 |" in text
    assert "Mean ± sd over seeds.\n" in text


def test_one_seed_has_no_spread():
    text = writers.markdown(one_row(Cell((-0.04,), signed=True), Cell((math.nan,))))
    assert "| r | 0.0 | nan |" in text and "One seed (n = 1), no spread." in text
    (row, _) = csv.DictReader(io.StringIO(writers.csv_text([one_row(Cell((1.0,)), Cell(text="x"))])))
    assert (row["mean"], row["sd"], row["n"], row["ci_low"]) == ("1.0", "", "1", "")


def test_a_row_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="table t: the row 'r' has 2 cells for 3 columns"):
        writers.markdown(Rendered("t", "T", ("a", "b", "c"), (("r", "x"),)))


def test_findings_are_told_in_order():
    tables = [
        Rendered("a", "A", findings=(writers.scale("small."), writers.failed("that."), "by itself")),
        Rendered("b", "B", findings=(writers.held("a*b."), writers.scale("small."))),
    ]
    assert writers.findings(*tables).splitlines() == [
        "- **Held.** a\\*b.",
        "- **Did not hold.** that.",
        "- **Scale.** small.",
        "- **Also.** by itself",
    ]


# ---------------------------------------------------------------- the papers' numbers


def test_printed_averages_are_not_the_macro_average(monkeypatch):
    found = published.mismatches()
    assert found.keys() == published.AVERAGED.keys() and len(found) == 4 * 4 + 2
    assert "so in 18 of the 18 rows of Tables 1 and 3" in published.INCONSISTENCIES["average"]
    first = next(iter(published.AVERAGED))
    right = published.AVERAGED[first]._replace(average=round(published.AVERAGED[first].recomputed, 2))
    monkeypatch.setitem(published.AVERAGED, first, right)
    assert first not in published.mismatches() and "so in 17 of" in published._inconsistencies()["average"]
    monkeypatch.undo()
    recomputed, printed = found["Table 1", "LLaMA-2-7B", published.FULL]
    assert (round(recomputed, 2), printed) == (5.49, 6.58)
    assert all(printed - recomputed > 0.9 for recomputed, printed in found.values()), "so in every row"


def test_gain_on_scarce_data_by_the_papers_own_numbers():
    gains = published.imbalance_gains()
    assert gains == pytest.approx({1.0: 0.1, 0.5: 1.6, 0.2: 4.2, 0.1: 4.85})


@pytest.mark.parametrize(
    "about, words",
    [
        ("average", "gives 5.49 where 6.58"),
        ("range", "from 6.96 to 7.70, its Table 1 from 6.98 to 7.73"),
        ("imbalance", "3.7 points at 10% of the data; by its own Table 4 it is 4.85"),
        ("scale", "-16.7"),
        ("gsm8k", "Table 1 has 5.1 to 5.7"),
        ("lowest", "Multi-stage (random, K = 3) on codealpaca, 4 of 4 models"),
        ("consistently", "task C."),
    ],
)
def test_inconsistencies_state_the_numbers(about, words):
    assert words in published.INCONSISTENCIES[about]
