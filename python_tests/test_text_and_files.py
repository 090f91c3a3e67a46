"""Sizes and columns as commands print them; files that are whole or absent."""

from __future__ import annotations

import errno
import os

import pytest

from epi_kernels.files import write_whole
from epi_kernels.text import columns, human_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (5 * 2**29, "2.50 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


def test_columns():
    lines = [("name", "n", ""), ("a", "1,000", "x"), ("long name", "2", "")]
    assert columns(lines) == "name           n\na          1,000  x\nlong name      2"
    ruled = columns(lines, left=(0, 1), rule=True).splitlines()
    assert ruled == ["name       n", "---------  -----  -", "a          1,000  x", "long name  2"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, before):
    path = tmp_path / "page.html"
    if before is not None:
        write_whole(path, before)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "fsync", full)
        write_whole(path, "new")
    assert [one.read_text() for one in tmp_path.iterdir()] == ([] if before is None else [before])
    write_whole(path, "new, ü")
    assert path.read_bytes() == "new, ü".encode()
    assert list(tmp_path.iterdir()) == [path]
