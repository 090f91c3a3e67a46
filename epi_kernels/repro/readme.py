"""The README's part on the reproduction: generated from a committed bundle, between markers, never typed.

<!-- reproduce:begin -->            everything: where the numbers come from, findings, all tables and figures
<!-- reproduce:begin provenance --> or one of these: provenance, findings, rows (of all tables, without notes), the name
                                   of a table, its name and -findings, -figures or -rows
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from epi_kernels.files import write_whole
from epi_kernels.markdown import rewrite_blocks
from epi_kernels.repro.bundle import Bundle, digest, read_bundle
from epi_kernels.repro.preset import Preset
from epi_kernels.repro.tables.base import Figure, Manifests, Rendered
from epi_kernels.repro.writers.markdown import figures, findings, markdown, rows
from epi_kernels.repro.writers.plots import shows, write_png

TOOL = "reproduce"
PLOTS = Path("bench") / "plots" / "reproduce"  # below the README's folder
NOTHING = "Not measured yet: `make reproduce`."

Render = Callable[[Preset, Manifests, Sequence[str]], Sequence[Rendered]]  # the tables of these names


def write_readme(readme: Path, results: Path, render: Render, tool: str = TOOL) -> list[str]:
    """Rewrites the blocks and draws the figures they show; returns what changed, by path below the README's folder.

    ``results``: a bundle; where there is none the blocks say so. ``tool``: the word that its markers begin with. Raises ReproError, ValueError (markers), OSError.
    """
    old, new, pictures, data = _made(readme, results, render, tool)
    changed = []
    for path, figure in pictures.items():
        if not shows(readme.parent / path, data):
            write_png(figure, readme.parent / path, data)
            changed.append(path.as_posix())
    if new != old:
        write_whole(readme, new)
        changed.append(readme.name)
    return changed


def stale(readme: Path, results: Path, render: Render, tool: str = TOOL) -> list[str]:
    """What `write_readme` would change; writes nothing."""
    old, new, pictures, data = _made(readme, results, render, tool)
    outdated = [path.as_posix() for path in pictures if not shows(readme.parent / path, data)]
    return outdated + ([readme.name] if new != old else [])


def _made(readme: Path, results: Path, render: Render, tool: str) -> tuple[str, str, dict[Path, Figure], str]:
    """The README as it is and as it should be, the figures that it should show, and the digest of the data."""
    old = readme.read_text(encoding="utf-8")
    if not results.exists():
        names = ["", *re.findall(rf"<!-- {tool}:begin ([\w-]+) -->", old)]
        return old, rewrite_blocks(old, tool, dict.fromkeys(names, lambda: NOTHING)), {}, ""
    found = read_bundle(results)
    tables = render(found.preset, found.manifests, found.tables)
    paths = {
        figure.name: PLOTS.parent / tool / f"{figure.name}.png" for one in tables for figure in one.figures
    }
    images = {name: path.as_posix() for name, path in paths.items()}
    makers: dict[str, Callable[[], str]] = {
        "provenance": lambda: provenance(found),
        "findings": lambda: findings(*tables),
        "rows": lambda: rows(*tables),
        **{one.name: lambda one=one: markdown(one, "####", images) for one in tables},
        **{f"{one.name}-findings": lambda one=one: findings(one) for one in tables},
        **{f"{one.name}-rows": lambda one=one: rows(one) for one in tables},
        **{f"{one.name}-figures": lambda one=one: figures(one, images) for one in tables},
    }
    makers[""] = lambda: "\n\n".join(
        [provenance(found), findings(*tables), *(markdown(one, "###", images).strip() for one in tables)]
    )
    new = rewrite_blocks(old, tool, makers)
    drawn = {paths[figure.name]: figure for one in tables for figure in one.figures}
    return (
        old,
        new,
        {path: one for path, one in drawn.items() if f"({path.as_posix()})" in new},
        digest(results),
    )


def provenance(found: Bundle) -> str:
    """A sentence: preset, seeds, runs, time, machines, commits, versions."""
    manifests = list(found.manifests.values())
    hours = sum(one.seconds for one in manifests) / 3600
    machines = sorted({machine_name(one.machine) for one in manifests})
    commits = sorted({one.source for one in manifests})
    torches = sorted({one.versions.get("torch", "unknown") for one in manifests})
    dates = sorted(one.finished[:10] for one in manifests)
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"Preset `{found.preset.name}`, {len(found.preset.seeds)} seeds, {len(manifests)} runs in "
        f"{f'{hours:.1f} hours' if hours >= 1 else f'{60 * hours:.1f} minutes'} of training and evaluation; "
        f"{' and '.join(machines)}; torch {', '.join(torches)}; commit {', '.join(commits)}; {when}."
    )


def machine_name(machine: dict[str, object]) -> str:
    """The accelerator where there is one, else the processor, with its cores."""
    device = machine.get("gpu") or machine.get("cpu") or "unknown machine"
    return (
        f"{device}, {machine['cores']} cores"
        if "cores" in machine and not machine.get("gpu")
        else str(device)
    )
