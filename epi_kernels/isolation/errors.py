"""What a caller can mend."""

from epi_kernels.finetune.errors import UserError


class IsolationError(UserError, ValueError):
    """A checkpoint, a core or an argument that does not fit; a ValueError in Python, one line from the command line."""
