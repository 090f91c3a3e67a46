"""What a user can mend: reported in a line, without a traceback."""

from __future__ import annotations

from epi_kernels.finetune.errors import UserError


class ReproError(UserError):
    """Names what was wrong and what to do; nothing is lost by it."""
