"""The one kind of error that a user's input causes."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Something the user gave cannot be used: a key, a path, a file, a cell.

    The message names what and where, what was expected and what to do. Commands print it without a
    traceback and exit with status 2; anything else is a bug and keeps its traceback.
    """


@contextlib.contextmanager
def writing_to(workdir: str) -> Iterator[None]:
    """Says in one message that a command's workdir cannot be written to.

    Raises:
      InputError: in place of an OSError in the block.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written to ({error.strerror}): "
            "name a directory of yours."
        ) from None
