"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Where `path` is written before it is whole; what a killed process leaves there is nobody's."""
    return path.with_name(path.name + ".partial")


def sync(path: Path) -> None:
    """Waits until a file, or what a directory lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write: all of it is at `path`, on the disk, or what was there before, whenever the
    process or the machine stops.

    An exception inside removes what was written.
    """
    partial = partial_of(path)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all. Raises OSError (a full disk, say)."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
