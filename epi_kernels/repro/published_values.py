"""What the two papers print, digit for digit, and where their numbers do not agree with themselves.

CPI-FT: arXiv 2508.21741, Tables 1 to 4. EPI: arXiv 2604.14010, of which only single numbers are known, from listings.
Nothing here was measured by this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from epi_kernels.repro.statistics import normalised_average

TASKS = ("gsm8k", "codealpaca", "logiqa", "alpaca", "ultrachat")
FULL_MARKS = {"gsm8k": 100.0, "codealpaca": 100.0, "logiqa": 100.0, "alpaca": 10.0, "ultrachat": 10.0}

FULL, RANDOM, HEURISTIC, CPIFT = "full", "random", "heuristic", "cpift"
METHODS = {
    FULL: "Full SFT (multi-task)",
    RANDOM: "Multi-stage (random, K = 3)",
    HEURISTIC: "Multi-stage (heuristic)",
    CPIFT: "CPI-FT (p = 1 %, tau = 0.1)",
}


class Scores(NamedTuple):
    """A printed row."""

    tasks: dict[str, float]  # percent, or a judge's points
    average: float  # the "Avg. Norm. Score" as printed

    @property
    def recomputed(self) -> float:
        """The average by the paper's own words: every task on 0-10, then the mean."""
        return normalised_average(self.tasks, FULL_MARKS)


def _row(*numbers: float) -> Scores:
    return Scores(dict(zip(TASKS, numbers[:-1])), numbers[-1])


TABLE1: dict[str, dict[str, Scores]] = {
    "LLaMA-2-7B": {
        FULL: _row(48.2, 25.1, 55.3, 7.1, 7.5, 6.58),
        RANDOM: _row(49.5, 24.8, 56.0, 7.3, 7.6, 6.70),
        HEURISTIC: _row(50.1, 25.5, 56.8, 7.0, 7.4, 6.75),
        CPIFT: _row(53.5, 27.2, 59.1, 7.6, 7.8, 7.21),
    },
    "Mistral-8B": {
        FULL: _row(46.5, 24.0, 53.8, 6.9, 7.3, 6.37),
        RANDOM: _row(47.8, 23.7, 54.5, 7.1, 7.4, 6.49),
        HEURISTIC: _row(48.3, 24.3, 55.2, 6.8, 7.2, 6.53),
        CPIFT: _row(51.6, 25.9, 57.4, 7.5, 7.7, 6.98),
    },
    "Qwen1.5-7B": {
        FULL: _row(49.8, 26.0, 56.5, 7.3, 7.7, 6.79),
        RANDOM: _row(51.0, 25.7, 57.3, 7.5, 7.8, 6.92),
        HEURISTIC: _row(51.7, 26.4, 58.0, 7.2, 7.6, 6.98),
        CPIFT: _row(55.3, 28.1, 60.6, 7.8, 8.1, 7.45),
    },
    "Gemma-9B": {
        FULL: _row(51.5, 27.2, 58.0, 7.6, 8.0, 7.05),
        RANDOM: _row(52.8, 26.9, 58.9, 7.8, 8.1, 7.19),
        HEURISTIC: _row(53.5, 27.6, 59.7, 7.5, 7.9, 7.26),
        CPIFT: _row(57.2, 29.4, 62.5, 8.1, 8.4, 7.73),
    },
}


class Forgetting(NamedTuple):
    """Change of each task's score by the second stage, LLaMA-2-7B; A is GSM8K, B is Alpaca."""

    a_then_b_a: float
    a_then_b_b: float
    b_then_a_b: float
    b_then_a_a: float


TABLE2 = {
    FULL: Forgetting(-24.5, 13.4, -16.7, 20.2),
    "multi-stage": Forgetting(-16.2, 12.6, -12.3, 17.5),
    CPIFT: Forgetting(-5.7, 12.2, -4.8, 18.8),
}

TABLE3 = {  # the base model is not named; no UltraChat column
    "multi-stage": _row(53.4, 27.1, 59.2, 7.6, 7.18),
    "single-stage": _row(51.9, 26.5, 58.1, 7.4, 7.01),
}

SHARES = (1.0, 0.5, 0.2, 0.1)  # of the target task's data
TABLE4_TASKS = {
    "A": "text classification",
    "B": "natural language inference",
    "C": "named entity recognition",
    "D": "code generation",
}
TABLE4 = {
    FULL: {
        "A": (92.1, 87.2, 78.0, 68.5),
        "B": (90.3, 86.1, 77.8, 70.2),
        "C": (88.4, 80.7, 74.3, 65.9),
        "D": (31.7, 27.8, 20.1, 15.9),
    },
    CPIFT: {
        "A": (92.3, 89.0, 82.4, 74.1),
        "B": (90.5, 87.8, 81.2, 75.3),
        "C": (88.1, 82.0, 78.1, 70.8),
        "D": (32.0, 29.4, 25.3, 19.7),
    },
}
# The rows with an average: by table, model ("-": none is named) and method.
AVERAGED = {
    ("Table 1", model, method): row for model, rows in TABLE1.items() for method, row in rows.items()
} | {("Table 3", "-", method): row for method, row in TABLE3.items()}
TABLE4_CLAIM = 3.7  # points that the text says DPI gains at 10 % of the data
RANGE_CLAIM = (6.96, 7.70)  # of CPI-FT's averages over the models, in the text
JUDGED = (1, 10)  # the judge's points on Alpaca and UltraChat

# EPI, on the best backbone for each task, and CPI-FT beside it as EPI's listing prints it.
EPI_BEST: dict[str, dict[str, float]] = {
    "epi": {"gsm8k": 65.0, "codealpaca": 33.2, "ultrachat": 9.1},
    CPIFT: {"gsm8k": 62.2, "codealpaca": 31.5},
}
EPI_FORGETTING = {"epi": 4.8, CPIFT: 5.6}  # rate on GSM8K; the term is not defined in what is known
EPI_CONFLICT = {"epi": 13.0, CPIFT: 14.0}  # of code; neither is this one
EPI_DRIFT = (78.0, 45.0)  # percent: Jaccard of the top sets, early and late in training
EPI_GAIN = (0.30, 0.36)  # average normalised score over static isolation, on four backbones
EPI_SOURCE = "EPI's numbers are known from public listings alone, not from its text: medium confidence."


def mismatches() -> dict[tuple[str, str, str], tuple[float, float]]:
    """(table, model, method) -> (average recomputed from the printed task scores, average printed), where they differ in
    the digits that are printed."""
    return {
        place: (row.recomputed, row.average)
        for place, row in AVERAGED.items()
        if round(row.recomputed, 2) != row.average
    }


def imbalance_gains() -> dict[float, float]:
    """Share of the data -> CPI-FT's mean gain over full fine-tuning on the task that was cut (Table 4)."""
    return {
        share: sum(TABLE4[CPIFT][task][i] - TABLE4[FULL][task][i] for task in TABLE4_TASKS)
        / len(TABLE4_TASKS)
        for i, share in enumerate(SHARES)
    }


def _below_full() -> str:
    """Where a multi-stage baseline of Table 1 is below full SFT, as "CodeAlpaca in 4 of 4 models"."""
    counts: Mapping[tuple[str, str], int] = {
        (method, task): sum(rows[method].tasks[task] < rows[FULL].tasks[task] for rows in TABLE1.values())
        for method in (RANDOM, HEURISTIC)
        for task in TASKS
    }
    return "; ".join(
        f"{METHODS[method]} on {task}, {count} of {len(TABLE1)} models"
        for (method, task), count in counts.items()
        if count
    )


def _inconsistencies() -> dict[str, str]:
    llama = TABLE1["LLaMA-2-7B"]
    best = sorted(rows[CPIFT].average for rows in TABLE1.values())
    gains = [rows[CPIFT].tasks["gsm8k"] - rows[FULL].tasks["gsm8k"] for rows in TABLE1.values()]
    equal = [task for task in TABLE4_TASKS if TABLE4[CPIFT][task][0] < TABLE4[FULL][task][0]]
    return {
        "average": "CPI-FT's printed averages are not the macro average on 0-10 that its text defines: LLaMA-2-7B, "
        f"full SFT, gives {llama[FULL].recomputed:.2f} where {llama[FULL].average:.2f} is printed; so in {len(mismatches())}"
        f" of the {len(AVERAGED)} rows of Tables 1 and 3. "
        "Ours follow the definition, and are no match for the printed ones.",
        "range": f"CPI-FT's text has its averages range from {RANGE_CLAIM[0]:.2f} to {RANGE_CLAIM[1]:.2f}, its "
        f"Table 1 from {best[0]:.2f} to {best[-1]:.2f}.",
        "lowest": f"CPI-FT's text has full SFT lowest on all tasks; Table 1 has it above: {_below_full()}.",
        "gsm8k": "CPI-FT's text has gains of 3-5 points over full SFT on GSM8K; Table 1 has "
        f"{min(gains):.1f} to {max(gains):.1f}.",
        "qwen": "CPI-FT's Table 1 names Qwen1.5-7B, its appendix Qwen2-7B.",
        "names": "CPI-FT's Figure 2 names Mistral-7B and Gemma-7B, its Table 1 Mistral-8B and Gemma-9B. No model was"
        " released as Mistral-8B or Gemma-9B; the nearest are Ministral-8B-Instruct, which is instruction-tuned, and Gemma-2-9B.",
        "freezing": "CPI-FT's stage 4 freezes all cores in one place of the paper and only those of earlier groups in "
        "another. Both readings can be run.",
        "scale": f"A change of {TABLE2[FULL].b_then_a_b:g} (CPI-FT's Table 2, Alpaca) cannot be on the "
        f"{JUDGED[0]}-{JUDGED[1]} scale the paper says Alpaca is judged on.",
        "table3": "Table 3's multi-stage row is close to Table 1's LLaMA-2-7B row for CPI-FT and not equal to it "
        f"(GSM8K {TABLE3['multi-stage'].tasks['gsm8k']:g} and {llama[CPIFT].tasks['gsm8k']:g}); it names no model.",
        "imbalance": f"CPI-FT's text claims {TABLE4_CLAIM:g} points at {SHARES[-1]:.0%} of the data; by its own "
        f"Table 4 it is {imbalance_gains()[SHARES[-1]]:.2f}.",
        "consistently": "CPI-FT's text has it consistently above full SFT in Table 4; with all data it is below on "
        f"task {', '.join(equal)}.",
    }


# Footnotes, by what they are about.
INCONSISTENCIES = _inconsistencies()
NOT_STATED = "CPI-FT does not state its learning rate, omega, epsilon and sampling share; EPI's beta and H are unknown."
