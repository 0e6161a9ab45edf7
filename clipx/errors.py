"""What a user can mend."""


class UserError(Exception):
    """A mistake of the user's: its one line names the key or file, the value, what is right and the remedy.

    The commands show the line alone and end with exit code 1; every other exception is a defect of ours and
    keeps its traceback.
    """
