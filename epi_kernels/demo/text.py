"""The results in words and as a table, for the terminal; the page says the same things."""

from __future__ import annotations

from typing import Any

from epi_kernels.demo.protocol import ADAMW, ISOLATION
from epi_kernels.scores import ABOVE, BELOW, INSIDE
from epi_kernels.text import columns

DEFINITION = (
    "dA@B is a run's score on A less what AdamW keeps of A when it reaches the same B. Freezing acts like a smaller "
    "learning rate, so one AdamW run is no fair comparison: AdamW's runs at two learning rates, from the same model, "
    "span a line of what it can trade (its frontier), and A is read off that line at the run's B, seed by seed. "
    "Above the highest B of AdamW's runs, AdamW is given the A of that run; below the lowest, the line goes on to the "
    "scores before stage B, where no run was made."
)


def plus_minus(value: dict[str, float], sign: bool = False) -> str:
    """mean ± sd, one decimal; the mean alone for a single seed."""
    mean = f"{value['mean']:+.1f}" if sign else f"{value['mean']:.1f}"
    return f"{mean} ± {value['sd']:.1f}" if value["n"] > 1 else mean


QUICK = (
    "A QUICK RUN: its numbers show nothing. The tasks, the training and the tests are too small; it only shows that "
    "everything runs. `epi-kernels demo` without --quick takes minutes and gives numbers to look at."
)


def learned_b(results: dict[str, Any]) -> bool:
    """Whether any arm learned B, on average over the seeds."""
    return max(arm["b"]["mean"] for arm in results["arms"]) >= results["settings"]["needed_b"]


def no_comparison(results: dict[str, Any]) -> str:
    best = max(results["arms"], key=lambda arm: arm["b"]["mean"])
    return (
        f"No comparison is possible: no arm learned B (the best, {best['label']}, reached {best['b']['mean']:.1f} %; "
        f"{results['settings']['needed_b']:g} % are needed), so there is no score on B at which A could be compared."
    )


def gain_cell(gain: dict[str, Any] | None, own: str) -> str:
    """dA@B with a mark for seeds off the frontier's range; `own` where the arm is part of the frontier."""
    if gain is None:
        return own
    marks = {BELOW: "<", ABOVE: ">"}
    off = "".join(f" {mark}{gain['where'][place]}" for place, mark in marks.items() if gain["where"][place])
    return plus_minus(gain, sign=True) + off


HEADERS = ("stage B learned with", "A after", "B after", "dA@B", "dA@B, moments kept")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    before = results["before_summary"]
    comparable = learned_b(results)
    table = [("(before stage B)", plus_minus(before["a"]), plus_minus(before["b"]), "", "")]
    for arm in results["arms"]:
        kept = "frontier" if arm["kind"] != ADAMW else ""
        table.append(
            (
                arm["label"],
                plus_minus(arm["a"]),
                plus_minus(arm["b"]),
                gain_cell(arm["gain"], "frontier") if comparable else "-",
                gain_cell(arm["gain_over_kept"], kept) if comparable else "-",
            )
        )
    return table


def of_kind(results: dict[str, Any], kind: str) -> dict[str, Any]:
    """The first arm of a kind."""
    return next(arm for arm in results["arms"] if arm["kind"] == kind)


def learned(results: dict[str, Any]) -> str:
    needed = results["settings"]["needed_a"]
    scores = ", ".join(f"seed {one['seed']}: {one['a']:.1f} %" for one in results["before"])
    if results["learned"]:
        return f"Task A was learned on every seed, to at least {needed:g} % ({scores})."
    return (
        f"Task A was NOT learned: every seed must reach {needed:g} % ({scores}). What follows means nothing."
    )


def _outcome(gain: dict[str, Any], over: str) -> str:
    """Who wins, by how much, on how many seeds; nothing is claimed that the spread does not bear."""
    values = [one["gain"] for one in gain["runs"]]
    wins, n = sum(value > 0 for value in values), len(values)
    size = f"dA@B over {over} is {plus_minus(gain, sign=True)} points, above zero on {wins} of {n} seeds"
    if wins == n:
        return f"Isolation keeps more of A at the same B: {size}."
    if gain["mean"] > 0:
        return f"No clear winner: {size}."
    return f"Isolation LOSES{'' if wins == 0 else ' on average'}: {size}."


def _places(gain: dict[str, Any], over: str) -> str | None:
    """Says plainly when isolation's B lies outside the frontier's runs, and what was done."""
    where = gain["where"]
    if where[INSIDE] == gain["n"]:
        return None
    said = []
    if where[ABOVE]:
        said.append(
            f"on {where[ABOVE]} of {gain['n']} seeds isolation's B is above every run of {over}, "
            "which is then given the A of its run with the highest B"
        )
    if where[BELOW]:
        said.append(
            f"on {where[BELOW]} of {gain['n']} seeds isolation's B is below every run of {over}: A is read off the "
            "line to the scores before stage B, an estimate that no run supports"
        )
    return "Outside the frontier's range: " + "; ".join(said) + "."


def price(results: dict[str, Any]) -> str:
    """The price on B, against the best B reached and against the same optimizer at the same rate, without mask."""
    prices, isolation = results["price_on_b"], of_kind(results, ISOLATION)
    free = [arm for arm in results["arms"] if arm["key"] in prices]
    best = max(free, key=lambda arm: arm["b"]["mean"])
    twin = [arm for arm in free if arm["kind"] != ADAMW and arm["lr"] == isolation["lr"]]
    said = [
        f"{plus_minus(prices[best['key']], True)} points against the best of the others ({best['label']})"
    ]
    if twin and twin[0] is not best:
        said.append(
            f"{plus_minus(prices[twin[0]['key']], True)} against the same optimizer and rate without a mask"
        )
    return f"The price on B: isolation ends at {plus_minus(isolation['b'])} %, " + ", ".join(said) + "."


def verdict(results: dict[str, Any]) -> list[str]:
    """One sentence each: the gain on A, where it comes from, the price on B."""
    if not learned_b(results):
        return [no_comparison(results)]
    isolation = of_kind(results, ISOLATION)
    sentences = [
        _outcome(isolation["gain"], "AdamW"),
        _places(isolation["gain"], "AdamW"),
        price(results),
        "How much of that is the mask's? carry_importance also keeps A's second moments, which make steps small where "
        "A's gradients were large; a torch.optim.AdamW that loads A's exp_avg_sq and step does so too, without a mask. "
        "Against that, at two learning rates: " + _outcome(isolation["gain_over_kept"], "moments kept"),
        _places(isolation["gain_over_kept"], "moments kept"),
    ]
    return [sentence for sentence in sentences if sentence]


def drift(results: dict[str, Any]) -> str:
    rows = results["drift"]["refreshes"]
    if len(rows) < 2:
        return "Drift: the mask was not refreshed during stage B."
    settings, later, last = results["settings"], rows[1:], rows[-1]
    mean = {
        name: sum(r[name]["mean"] for r in later) / len(later) for name in ("jaccard", "entered", "released")
    }
    return (
        f"Drift: {len(later)} refreshes, one every {settings['interval']} steps. Successive masks overlap (Jaccard) by "
        f"{mean['jaccard']:.2f} on average, with {mean['entered']:.0f} elements entered and {mean['released']:.0f} "
        f"released of {last['isolated']['mean']:.0f}; the last and the first mask by {last['jaccard_first']['mean']:.2f} "
        f"± {last['jaccard_first']['sd']:.2f} (two random masks: {results['drift']['chance']:.2f})."
    )


def memory(results: dict[str, Any]) -> str:
    size = results["optimizer_bytes"]
    n = size["n_parameters"]

    def per(name: str) -> str:
        return f"{size[name]:,} bytes ({size[name] / n:.3f} a parameter)"

    return (
        f"Optimizer state for {n:,} float32 parameters: MaskedEMAAdamW {per('isolation')}, and nothing more during a "
        f"refresh; torch.optim.AdamW {per('torch_adamw')}; EPI as published, computed and not run, "
        f"{per('epi_as_published')}, and {size['epi_as_published_refresh']:,} more during a refresh."
    )


def method(results: dict[str, Any]) -> str:
    settings, seeds = results["settings"], len(results["seeds"])
    spread = (
        f"± is the sample standard deviation over n = {seeds} seeds" if seeds > 1 else "One seed: no spread"
    )
    share = settings["known"] / (settings["learn"] + settings["known"])
    others = (
        f", with other string instructions as {100 * share:g} % of the examples, in place of pre-training"
        if share
        else ""
    )
    return (
        f"A: sums with steps (47+38= to 15;08;085.), {settings['steps_a']} steps{others}. "
        f"B: five new string instructions (rev b4d= to d4b.), {settings['steps_b']} steps without any data of A. "
        f"Scores: percent of {settings['test']} unseen prompts answered without a mistake. "
        f"Ratio used: p = {100 * settings['ratio']:g} %, mask interval H = {settings['interval']}. {spread}."
    )


def timing(results: dict[str, Any]) -> str:
    spent = results["timing"]
    processes = "1 process" if spent["workers"] == 1 else f"{spent['workers']} processes"
    return (
        f"Training took {spent['wall_s']:.0f} s ({spent['cpu_s']:.0f} s of CPU) on {processes} of one thread "
        f"each; isolation ran on the {results['backend']} backend."
    )


def table(results: dict[str, Any]) -> str:
    return columns([HEADERS, *rows(results)], rule=True)


def wrapped(text: str, width: int = 100) -> str:
    import textwrap

    return textwrap.fill(text, width)


def report(results: dict[str, Any]) -> str:
    """Everything the terminal shows."""
    parts = [wrapped(QUICK)] if results["settings"]["quick"] else []
    parts += [wrapped(method(results)), wrapped(learned(results)), table(results)]
    if _has_marks(results):
        parts[-1] += "\n<n, >n: on n seeds B lies below, above the frontier's runs; see below"
    parts += [wrapped(sentence) for sentence in verdict(results)] if results["learned"] else []
    parts += [wrapped(part) for part in (DEFINITION, drift(results), memory(results), timing(results))]
    return "\n\n".join(parts)


def _has_marks(results: dict[str, Any]) -> bool:
    gains = [arm[name] for arm in results["arms"] for name in ("gain", "gain_over_kept") if arm[name]]
    return learned_b(results) and any(gain["where"][INSIDE] < gain["n"] for gain in gains)
