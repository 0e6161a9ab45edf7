"""What a user can mend."""


class UserError(Exception):
    """A mistake of the user's: its one line names the key or file, the value, what is right and the remedy.

    The commands show the line alone and end with exit code 1; every other exception is a defect of ours and
    keeps its traceback.
    """


class Interrupted(BaseException):
    """A signal has asked the process to end; what it did is saved.  No ``Exception``: a sweep ends with it, too.

    Args:
        code: to exit with.
    """

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code
