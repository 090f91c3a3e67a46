"""make exactness, make stopped and make codebooks: the README's blocks from records made by hand, and the committed records."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from bench import codebooks, exactness, report, results, stopped
from epi_kernels.kernels_report.exactness import FORMS, ROUNDINGS, STATES
from epi_kernels.reference import codec
from python_tests.bench_rows import shared


def cost(form: str, states: str, rounding: str) -> dict:
    """As shipped 90 with 8-bit states, 20 less with bfloat16's, 15 less to nearest, 10 less a form."""
    each = 90.0 - 20 * (states == "bf16") - 15 * (rounding == "nearest") - 10 * bool(form)
    counts = {"instructions_per_element": each, "common_instructions_per_element": each - 5}
    return {"arch": "sm_90", "states": states, "rounding": rounding, "given_up": form} | counts


def test_the_block_of_exactness_names_every_price(tmp_path):
    assert exactness.text(tmp_path) == "Not measured yet: `make exactness`."
    rows = [cost(f, s, r) for f in ("", "rounded root") for s in STATES for r in ROUNDINGS]
    record = shared() | {"versions": {"triton": "9.9"}, "rows": rows}
    results.write_record(record, tmp_path, "exactness-2030-01-02-0123456789", ("rows",))
    text = exactness.text(tmp_path)
    assert "Triton 9.9, 2030-01-02, commit 0123456789, in" in text
    assert "| nothing, as shipped | **90.0** | **75.0** | **70.0** | **55.0** |" in text
    assert "| rounded root | 80.0 (-10.0) | 65.0 (-10.0) | 60.0 (-10.0) | 45.0 (-10.0) |" in text
    assert "costs 15.0 with codes and 15.0 with bfloat16 states, codes 20.0 and 20.0" in text
    assert "from left to right 0, 1, 1, 2 of 2 meet it." in text
    # 85 and 70 instructions where there is time for 73 while 10.3 bytes move; torch's steps move 14 and 28
    assert (
        "| stochastic | 1.16 | 86 % | 0.86 | 0.43 |" in text
        and "| nearest | 1.00 | 100 % | 0.74 | 0.37 |" in text
    )
    assert "| aim, stochastic | - | at least 85 % | at most 0.80 | at most 0.42 |" in text


def times(left: list[int], entered: list[int]) -> stopped.Times:
    return stopped.Times(torch.tensor(left), torch.tensor(entered), [1.0, 0.0, 1.0])


def test_the_block_of_stopped_elements_counts_those_more_than_one_refresh_apart(tmp_path, monkeypatch):
    assert stopped.text(tmp_path) == "Not measured yet: `make stopped`."
    runs = iter(
        [
            times([8, 8, 8, 9], [5] * 4),
            *[times([6, 7, 9, 0], [5, 6, 7, 3])] * (len(stopped.CONFIGURATIONS) - 1),
        ]
    )
    monkeypatch.setattr(stopped, "run", lambda plan, **dtypes: next(runs))
    results.write_record(stopped.record(), tmp_path, "stopped-2030-01-02-0123456789", ("rows",))
    lines = stopped.text(tmp_path).splitlines()
    assert "| float32 | 8.2 ± 0.5 | 8 to 9 | - | 5.0 ± 0.0 | 5 to 5 | - |" in lines
    # 6 of 8, and too late of 9; 7 and 3 of 5
    assert "| 8-bit | 7.3 ± 1.5 | 6 to 9, 1 later | 50 % | 5.2 ± 1.7 | 3 to 7 | 50 % |" in lines


def test_the_shipped_code_book_is_the_codecs():
    codes = torch.arange(4, 256, dtype=torch.uint8)
    scales = torch.full((4,), 103, dtype=torch.uint8)  # biased exponent 127
    assert torch.equal(codec.decode(codes, scales, signed=False).double(), codebooks.BOOKS[codebooks.SHIPPED])


def test_a_code_book_that_holds_every_value_costs_nothing_and_one_without_range_stalls():
    plan = codebooks.Plan(blocks=8, steps=60, beta=0.9, warmup=20)
    exact = lambda size: codebooks._trained(None, plan, size)  # noqa: E731
    fine = codebooks.measure(codebooks.floats(5, 16), plan, exact)
    assert fine["noise"] < 1e-3 and fine["jaccard"] == [1.0, 1.0]
    assert fine["steps"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-3)
    coarse = codebooks.measure(codebooks.floats(3, 4), plan, exact)
    assert coarse["steps"][2] < 0.02, "held at the smallest code, steps are too short"


def test_the_committed_records_are_whole():
    books = results.newest_record(results.RESULTS, codebooks.PREFIX)
    assert books is not None and [row["book"] for row in books["rows"]] == list(codebooks.BOOKS)
    costs = results.newest_record(results.RESULTS, exactness.PREFIX)
    assert costs is not None and len(costs["rows"]) == len(FORMS) * len(STATES) * len(ROUNDINGS)
    for row in costs["rows"]:
        assert bool(row["inexact"]) == bool(row["given_up"]), (
            "as shipped nothing is inexact, else something is"
        )
    found = results.newest_record(results.RESULTS, stopped.PREFIX)
    assert found is not None and found["plan"] == json.loads(json.dumps(asdict(stopped.Plan())))
    assert [row["configuration"] for row in found["rows"]] == list(stopped.CONFIGURATIONS)


@pytest.mark.parametrize("name", ["exactness", "stopped", "codebooks"])
def test_the_report_makes_the_block(name, tmp_path):
    readme = f"<!-- bench:begin {name} -->\nold\n<!-- bench:end {name} -->\n"
    assert f"Not measured yet: `make {name}`." in report.rewrite(readme, tmp_path)
    assert "Not measured yet" not in report.rewrite(readme)
