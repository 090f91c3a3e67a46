"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
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
def held(directory: Path) -> Iterator[None]:
    """One process at a time is at work in a directory, which is made here and goes again if nothing was put into it.

    A lock on the directory itself: a killed process leaves nothing behind. A file system without such locks has none.
    Raises BlockingIOError where another process holds it, another OSError where the directory cannot be made.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it holds something
            for path in made:
                path.rmdir()


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
