"""Files that are there whole, or as they were."""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator

_STALE_SECONDS = 24 * 3600
_PARTIAL = ".partial-"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yields the name of a file to write beside `path`, moved there when the block has ended.

    A reader sees the old file or the new one, never a part. If the block raises, `path` stays as it
    was and nothing is left beside it; a killed process may leave the file beside it.

    Raises:
      OSError: the file cannot be moved there.
    """
    partial = f"{os.fspath(path)}{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def target(path: str | os.PathLike) -> str:
    """Returns where a file is written: what a link leads to, else the path itself."""
    return os.path.realpath(path) if os.path.islink(path) else os.fspath(path)


def whole(path: str) -> str:
    """Returns what a file that `replacing` made stands in for, and any other path as it is."""
    return re.sub(rf"{re.escape(_PARTIAL)}\d+-[0-9a-f]{{8}}$", "", path)


def leftovers(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Returns the files in a directory that `replacing` is writing, or was when it was killed."""
    return directory.glob(f"*{_PARTIAL}*")


def sweep(paths: Iterable[pathlib.Path]) -> None:
    """Removes those of `paths` that nobody has written to for a day: a killed process left them."""
    for path in paths:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file by `replacing`, UTF-8.

    Raises:
      OSError: it cannot be written.
    """
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
