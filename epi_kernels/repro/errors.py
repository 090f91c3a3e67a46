"""What a user can mend: reported in a line, without a traceback."""

from __future__ import annotations


class ReproError(Exception):
    """Names what was wrong and what to do; nothing is lost by it."""
