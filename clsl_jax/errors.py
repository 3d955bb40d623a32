"""The one kind of error that a user's input causes."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from clsl_jax import atomic

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


class InputError(ValueError):
    """Something the user gave cannot be used: a key, a path, a file, a cell.

    The message names what and where, what was expected and what to do. Commands print it without a
    traceback and exit with status 2; anything else is a bug and keeps its traceback.
    """


class Stuck(InputError):
    """As `InputError`, and a thread of this process waits for something that may never come.

    The process must not wait for that thread when it ends.
    """


def listed(names: Sequence[str], most: int) -> str:
    """Returns "a, b", or "a, b and 7 more" of more than `most` names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException, most: int = 300) -> str:
    """Returns the first line of what an error says, or its kind if it says nothing."""
    return str(error).strip().partition("\n")[0][:most] or type(error).__name__


@contextlib.contextmanager
def writing(place: str | os.PathLike, advice: str) -> Iterator[None]:
    """Says in one message that something cannot be written, and what to do about it.

    Raises:
      InputError: in place of an OSError in the block.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{place} cannot be written to ({error.strerror or error}){advice}."
        ) from None


@contextlib.contextmanager
def unwritable(place: str, then: str) -> Iterator[None]:
    """Says in one message that there is no room, or no permission to write, in long work.

    Args:
      place: named where the error names no file.
      then: what the same command does when it is run again.

    Raises:
      InputError: in place of such an OSError in the block; others are left as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_NO_ROOM, *_NOT_ALLOWED):
            raise
        remedy = "Make room" if error.errno in _NO_ROOM else "Make it writable for you"
        raise InputError(
            f"{atomic.whole(error.filename or place)} cannot be written ({error.strerror}). "
            f"{remedy} and run the same command again: {then}."
        ) from error


def writing_to(workdir: str) -> contextlib.AbstractContextManager[None]:
    """Returns `writing` of a command's workdir."""
    return writing(f"--workdir={workdir}", ": name a directory of yours")
