"""Errors that the user can fix, and the end by a signal."""


class UserError(Exception):
    """A mistake of the user, in one line: the key or file, the value, what is right and how to fix it.

    Commands print the line without a traceback and exit with code 1.  Every other exception is a bug of clipx and keeps
    its traceback.
    """


class Interrupted(BaseException):
    """A signal has ended the process, after a save.  Not an ``Exception``, because it must also end a sweep.

    Args:
        code: to exit with.
    """

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
