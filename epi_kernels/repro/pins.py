"""Which of what a preset reads comes from the hub, and which commits that was.

A name stands for whatever its owner keeps there. A branch or a tag can be moved; a full commit hash cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from epi_kernels.repro import lm_eval
from epi_kernels.repro.config import ModelSpec, TaskSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.hub import COMMITS, HASH, Source
from epi_kernels.repro.tasks import hub_of


def sources(spec: ModelSpec | TaskSpec) -> list[Source]:
    """What a model's weights and tokenizer, or a task's data, are of the hub; none of what lies in a folder."""
    if isinstance(spec, TaskSpec):
        hub = hub_of(spec)
        return [(hub.name, hub.revision)] if hub is not None else []
    return [(name, revision) for name, revision in _named(spec) if not _is_folder(name)]


def refuse_revision_of_a_folder(spec: ModelSpec | TaskSpec) -> None:
    """Raises ReproError where a `revision` stands beside what does not come from the hub."""
    if isinstance(spec, TaskSpec):
        if spec.revision is not None and hub_of(spec) is None:
            where = f"{spec.source} is a folder" if spec.source else "it has no data on the hub"
            raise ReproError(f"task {spec.kind}: {where}; leave out `revision`")
        return
    for name, revision in _named(spec):
        if revision is not None and _is_folder(name):
            raise ReproError(f"model {spec.checkpoint}: {name} is a folder; leave out its revision")


def commits(specs: Iterable[ModelSpec | TaskSpec]) -> dict[str, str]:
    """Of what this process took from the hub for these, as far as the hub's libraries told: name or NAME@REVISION ->
    hash."""
    used = dict.fromkeys(source for spec in specs for source in sources(spec))
    return {_told(source): COMMITS[source] for source in used if source in COMMITS}


def unpinned(specs: Iterable[ModelSpec | TaskSpec]) -> list[str]:
    """What may be another thing tomorrow: names without a commit's hash, and what lm-eval reads by itself."""
    names: dict[str, None] = {}
    for spec in specs:
        for source in sources(spec):
            if not HASH.fullmatch(source[1] or ""):
                names[_told(source)] = None
        if isinstance(spec, TaskSpec) and spec.harness == "lm-eval":
            names[f"lm-eval's {lm_eval.entry_of(spec.kind).task}"] = None
    return list(names)


def _named(spec: ModelSpec) -> list[Source]:
    """A model's weights and its own tokenizer, in folders or not."""
    both = ((spec.checkpoint, spec.revision), (spec.tokenizer, spec.tokenizer_revision))
    return [(name, revision) for name, revision in both if name is not None]


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _told(source: Source) -> str:
    name, revision = source
    return name if revision is None else f"{name}@{revision}"
