"""Errors that end a command with a message and no traceback."""


class UserError(Exception):
    """Something the user gave, or the machine lacks. The text says what is wrong and what to do; `status` is the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
