"""Errors that end a command with a message and no traceback."""


class UserError(Exception):
    """Something the user gave, or the machine lacks. The text says what is wrong and what to do; `status` is the exit status.

    `shared`: all ranks of the run raise it, so that one of them says it for all.
    """

    def __init__(self, message: str, status: int = 2, shared: bool = False):
        super().__init__(message)
        self.status, self.shared = status, shared
