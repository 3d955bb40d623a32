"""The one kind of error that a user's input causes."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from clsl_jax import atomic

# What somebody has to do before the same command can go on.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable for you"),
}
# Storage that does not answer may do so soon; these are of a disk or of what it is mounted from.
PASSING = (
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH),
)


class InputError(ValueError):
    """Something the user gave cannot be used: a key, a path, a file, a cell.

    The message names what and where, what was expected and what to do. Commands print it without a
    traceback and exit with status 2; anything else is a bug and keeps its traceback.

    Attributes:
      status: of the program's exit; launchers start no program again that ended with 2.
    """

    status = 2


class Unavailable(InputError):
    """As `InputError`, where storage or workers gave out: the same command may well go on.

    A thread of this process may wait for what never comes; the process must not wait for it.
    """

    status = 1


def listed(names: Sequence[str], most: int) -> str:
    """Returns "a, b", or "a, b and 7 more" of more than `most` names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException, most: int = 300) -> str:
    """Returns the first line of what an error says, or its kind if it says nothing."""
    return str(error).strip().partition("\n")[0][:most] or type(error).__name__


def printable(path: str) -> str:
    """Returns a path as UTF-8 can hold it: a file's name may be any bytes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def may_pass(error: BaseException) -> bool:
    """Returns whether the storage did not answer, so that the same may be tried again."""
    return isinstance(error, OSError) and error.errno in PASSING


@contextlib.contextmanager
def writing(place: str | os.PathLike, advice: str) -> Iterator[None]:
    """Says in one message that something cannot be written, and what to do about it.

    Raises:
      InputError: in place of an OSError in the block; `Unavailable` of those that may pass.
    """
    try:
        yield
    except OSError as error:
        raise (Unavailable if may_pass(error) else InputError)(
            f"{place} cannot be written to ({error.strerror or error}){advice}."
        ) from None


def remedy(reason: str) -> str:
    """Returns what to do where the system gives this reason, such as "Make room"; '' of others."""
    return next((what for code, what in _REMEDIES.items() if os.strerror(code) == reason), "")


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
        if error.errno not in _REMEDIES:
            raise
        raise InputError(
            f"{atomic.whole(error.filename or place)} cannot be written ({error.strerror}). "
            f"{_REMEDIES[error.errno]} and run the same command again: {then}."
        ) from error


def writing_to(workdir: str) -> contextlib.AbstractContextManager[None]:
    """Returns `writing` of a command's workdir."""
    return writing(f"--workdir={workdir}", ": name a directory of yours")
