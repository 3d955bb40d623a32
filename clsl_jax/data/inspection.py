"""Reads and decodes every image of a listing once: what cannot be read, and what is there twice."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from clsl_jax.data import images as images_lib
from clsl_jax.data import threads
from clsl_jax.errors import InputError, writing

READABLE, DAMAGED, UNREADABLE, MISSING = "readable", "damaged", "unreadable", "missing"


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What was found of an image file.

    Attributes:
      state: `readable`; `damaged` (cut off or broken, but its pixels can be made up: it is used);
        `unreadable`; `missing`.
      reason: why, if not readable.
      sha256: of the file, hex.
      size, modified: bytes, and time stamp in ns: a file that changes is read again.
      width, height: in pixels, 0 if not known.
      mode: Pillow's name of its colours: RGB, L (grey), CMYK, …
    """

    state: str
    reason: str = ""
    sha256: str = ""
    size: int = 0
    modified: int = 0
    width: int = 0
    height: int = 0
    mode: str = ""


def inspect_image(path: pathlib.Path) -> Inspected:
    """Reads and decodes an image file."""
    try:
        status = path.stat()
        content = path.read_bytes()
    except FileNotFoundError:
        return Inspected(MISSING, "no such file")
    except OSError as error:
        return Inspected(UNREADABLE, error.strerror or str(error))
    found = Inspected(
        READABLE,
        sha256=hashlib.sha256(content).hexdigest(),
        size=status.st_size,
        modified=status.st_mtime_ns,
    )
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = dataclasses.replace(
                found, width=image.width, height=image.height, mode=image.mode
            )
            image.load()
        if image.mode not in images_lib.WIDE_MODES:
            return found
        state, reason = READABLE, ""  # 16 bits a channel can be among them
    except Image.DecompressionBombError as error:
        state, reason = READABLE, str(error)  # of no more than its size
    except Exception as error:  # Pillow's readers raise anything on broken files
        state, reason = DAMAGED, str(error).replace("\n", " ")
    # Pillow names the Python object that it was handed.
    if reason.startswith("cannot identify image file"):
        reason = "of no image format that is known"
    try:
        height, width = images_lib.decode_image(content).shape[:2]
    except images_lib.WideImage:
        state, reason = UNREADABLE, "32 bits a channel: convert it to 8"
    except InputError:
        state, reason = UNREADABLE, reason if content else "an empty file"
    else:
        reason = "" if state == READABLE else reason
        found = dataclasses.replace(found, width=width, height=height, mode=found.mode or "?")
    return dataclasses.replace(found, state=state, reason=reason)


def inspect_images(
    paths: Sequence[pathlib.Path],
    *,
    workers: int,
    journal: pathlib.Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Inspected]:
    """Inspects image files in parallel.

    Args:
      paths: N files.
      workers: threads; decoding runs outside Python's lock.
      journal: results are added to this file as they come and taken from it where the file has not
        changed since, so that a run that was stopped goes on where it was.
      advance: called after each image.

    Returns:
      N results, in the order of `paths`.
    """
    known = _read_journal(journal) if journal else {}

    def inspect(path: pathlib.Path) -> Inspected:
        found = known.get(os.fspath(path))
        if found is not None and _unchanged(path, found):
            return found
        return inspect_image(path)

    results = []
    inspected = threads.in_order(inspect, paths, threads=workers, ahead=8 * workers)
    with _appending(journal) as append, contextlib.closing(inspected):
        for path, found in zip(paths, inspected, strict=True):
            if known.get(os.fspath(path)) != found:
                append(path, found)
            results.append(found)
            advance()
    return results


def _unchanged(path: pathlib.Path, found: Inspected) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (found.size, found.modified)


def _read_journal(journal: pathlib.Path) -> dict[str, Inspected]:
    found: dict[str, Inspected] = {}
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        # The last line may have been cut off; whatever cannot be read is inspected again.
        with contextlib.suppress(ValueError, TypeError):
            path, facts = json.loads(line)
            found[path] = Inspected(**facts)
    return found


@contextlib.contextmanager
def _appending(
    journal: pathlib.Path | None,
) -> Iterator[Callable[[pathlib.Path, Inspected], None]]:
    if journal is None:
        yield lambda path, found: None
        return
    with writing(journal, "; name another --out"):
        journal.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a", encoding="utf-8", buffering=1) as file:
            if file.tell():
                file.write("\n")  # after a line that was cut off
            yield lambda path, found: file.write(
                json.dumps([os.fspath(path), dataclasses.asdict(found)]) + "\n"
            )
