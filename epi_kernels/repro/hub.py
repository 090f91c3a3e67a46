"""Files from the hub: by name and `revision`, downloaded once, and which commit that was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from epi_kernels.repro.errors import ReproError

HASH = re.compile(r"[0-9a-f]{40}")  # of a commit
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
OTHER_FORMATS = ("consolidated*", "original/*")  # the same weights once more
TOKENIZER_FILES = tuple(one for one in CHECKPOINT_FILES if "safetensors" not in one)

Source = tuple[str, str | None]  # a name on the hub and a revision; None: what its main branch is by then
COMMITS: dict[Source, str] = {}  # what this process took from the hub, as far as the hub's libraries told


def fetched(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of that name, or what the hub has under it, downloaded once; one commit a process, so that weights and
    tokenizer fit. Raises ReproError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        found = Path(
            snapshot_download(
                name,
                revision=COMMITS.get((name, revision), revision),
                allow_patterns=list(patterns),
                ignore_patterns=list(OTHER_FORMATS),
            )
        )
    except Exception as error:  # the hub's own errors, of many kinds
        at = "" if revision is None else f" at revision {revision}"
        raise ReproError(f"{name}{at}: no such folder, and the hub gave none ({error})") from None
    if HASH.fullmatch(found.name):  # .../snapshots/HASH
        COMMITS[name, revision] = found.name
    return found
