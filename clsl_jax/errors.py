"""The one kind of error that a user's input causes."""


class InputError(ValueError):
    """Something the user gave cannot be used: a key, a path, a file, a cell.

    The message names what and where, what was expected and what to do. Commands print it without a
    traceback and exit with status 2; anything else is a bug and keeps its traceback.
    """
