"""python -m bench.isolated_rows: a smoke run, its rows, and the table that is made of them."""

from __future__ import annotations

from bench import isolated_rows, results
from python_tests.threads import on_threads


def test_rows_and_their_table(tmp_path, capsys):
    with on_threads(1):
        assert isolated_rows.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "of element-wise" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    rows = results.load(path)
    assert len(rows) == len(isolated_rows.KINDS) * len(isolated_rows.LAYOUTS) * len(isolated_rows.SHARES)
    for row in rows:
        assert row["share"] in isolated_rows.SHARES and row["state_bytes"] <= row["beside_state_bytes"]
        if row["layout"] == "contiguous":  # by rows 1 - share of it, but for what a run takes
            assert row["state_bytes"] < (1.01 - row["share"]) * row["beside_state_bytes"]
    assert isolated_rows.section(tmp_path).startswith("Not measured yet"), "no whole run"
    table = isolated_rows.section(results.RESULTS)
    assert table.startswith("Not measured yet") or table.count("\n|") >= len(rows)
