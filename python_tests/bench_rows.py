"""Result rows made by hand, from timings whose ratios one can work out."""

from __future__ import annotations

from bench import registry, report, results, run


def library_case(**extra) -> dict:
    """A case as pytest-benchmark reports it, with round numbers: ours 2, 4, 6 ms, its pair 1, 2, 2 ms."""
    facts = {
        "name": "step-f32",
        "group": "step",
        "dtype": "float32",
        "elements": 1_000_000,
        "tensors": 10,
        "options": {},
        "cold": False,
        "isolated": 0.01,
        "backend": "cpu",
        "threads": 2,
        "target": registry.STEP_FLOAT32._asdict(),
        "bytes_per_element": 28.125,
        "beside": registry.TORCH,
        "beside_bytes_per_element": 28.0,
        "beside_seconds": [0.001, 0.002, 0.002],
        "preempted_per_round": 0.0,
    }
    return {"extra_info": facts | extra, "stats": {"data": [0.002, 0.004, 0.006], "rounds": 3}}


def shared() -> dict:
    machine = {"cpu": "Some CPU", "cores": 2, "isa": "avx512"}
    return {
        "schema": results.SCHEMA,
        "machine": machine,
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789",
        "dirty": False,
        "date": "2030-01-02T03:04:05Z",
        "complete": True,
        "load_before": 0.0,
    }


def linear_rows(nanoseconds: dict[int, float], stem: str, end: str = "") -> list[dict]:
    rows = []
    for n, ns in nanoseconds.items():
        case = library_case(name=f"{stem}{registry.scientific(n)}{end}", group="linear", elements=n)
        case["stats"]["data"] = [1e-9 * ns * n] * 3
        rows.append(run.timing_row(case, shared()))
    return rows


def complete_run(date: str = "2030-01-02T03:04:05Z", ms: float = 2.0) -> list[dict]:
    """One row of every kind."""
    cases = [library_case(name=name) for name in report.STEP_TITLES]
    cases += [library_case(name="copy", group="copy", target=None, bytes_per_element=8.0)]
    refresh = registry.REFRESH._asdict()
    cases += [
        library_case(
            name=f"refresh-{dtype}-minmax-global-{kind}",
            group="refresh",
            target=refresh,
            bytes_per_element=8.25,
        )
        for dtype in ("f32", "bf16")
        for kind in ("after-step", "stand-alone")
    ]
    for case in cases:
        case["stats"]["data"] = [1e-3 * ms] * 3
    rows = [run.timing_row(case, shared()) for case in cases]
    sizes = {10**6: 2.0, 10**7: 2.0, 10**8: 2.0}
    rows += linear_rows(sizes, "linear-step-f32-") + linear_rows(sizes, "linear-refresh-f32-", "-stand-alone")
    rows += run.fit_rows(rows, dict.fromkeys(results.ROW_KEYS))
    memory = {
        "name": "memory-f32",
        "group": "memory",
        "extra_mib": {"refresh": 0.25},
        "peak_mib": {"step": 0.5},
    }
    rows.append(
        {key: rows[0].get(key) for key in results.ROW_KEYS}
        | memory
        | {"target": registry.REFRESH_PEAK._asdict()}
    )
    for row in rows:
        row["date"] = date
    run.judge(rows, judged=True)
    return rows
