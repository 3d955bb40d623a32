"""What a data set's own files say: its images, where they lie, and their labels."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from clsl_jax.errors import InputError, listed

_LONGEST_NAME = 255  # bytes, on every usual file system


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The images of a split, as listed; whether they can be read is not known yet.

    Attributes:
      paths: N files.
      ids: N names, unique in the split.
      labels: int8 [N, C]: 1 positive, 0 negative, -1 unknown, 2 difficult.
    """

    paths: list[pathlib.Path]
    ids: list[str]
    labels: np.ndarray

    def rows(self, rows: Sequence[int] | np.ndarray) -> "ImageList":
        """Returns some of the images."""
        return ImageList(
            [self.paths[row] for row in rows],
            [self.ids[row] for row in rows],
            self.labels[np.asarray(rows, np.int64)],
        )


@dataclasses.dataclass(frozen=True)
class Published:
    """Counts that the makers of a set, or papers, give; None where nobody does.

    Attributes:
      classes: number of classes.
      images: images of each split.
      labels: positive labels of each split: pairs of image and class.
      without_labels: images of each split that have no label.
    """

    classes: int | None = None
    images: Mapping[str, int] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    without_labels: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Listing:
    """A data set before it is prepared.

    Attributes:
      name: by which it is loaded later.
      class_names: C names.
      splits: `train` and `test`, perhaps `validation`; of a table perhaps `train` alone.
      published: what the counts are held against.
      notes: choices made in reading it, and what looks odd; for the report.
      description, licence: in a sentence each.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, ImageList]
    published: Published = dataclasses.field(default_factory=Published)
    notes: list[str] = dataclasses.field(default_factory=list)
    description: str = ""
    licence: str = ""


def existing(*candidates: pathlib.Path, what: str) -> pathlib.Path:
    """Returns the first path that exists.

    Raises:
      InputError: none does, or none may be read; names `what` was looked for, and every place.
    """
    for path in candidates:
        if os.path.exists(path):
            return path
    places = "\n  ".join(os.fspath(path) for path in candidates)
    raise InputError(f"{what}: not found, or it may not be read. Looked for\n  {places}")


def read_lines(path: pathlib.Path) -> list[str]:
    """Returns the lines of a text file without line ends, outer blanks and empty lines.

    Raises:
      InputError: the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    return [line for line in map(str.strip, text.splitlines()) if line]


def check_unique(names: Sequence[str], where: str, what: str = "images") -> None:
    """Raises `InputError` if a name occurs twice, saying which."""
    if len(set(names)) < len(names):
        first: set[str] = set()
        twice = sorted({name for name in names if name in first or first.add(name)})
        raise InputError(f"{where}: {len(twice)} {what} listed twice: {listed(twice, 5)}.")


def check_file_names(names: Sequence[str], where: str, what: str = "images") -> None:
    """Raises `InputError` if there is no name, one occurs twice, or one can be no file's."""
    if not names:
        raise InputError(f"{where} lists nothing.")
    for name in names:
        try:
            encoded = os.fsencode(name)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
            raise InputError(f"{where}: {name[:50]!r} can be no file's name.")
    check_unique(names, where, what)


def without_labels(labels: np.ndarray) -> np.ndarray:
    """Returns bool [N]: images that have no positive label and no unknown one.

    Args:
      labels: int8 [N, C]: 1 positive, 0 negative, -1 unknown, 2 difficult.
    """
    return ~((labels == 1) | (labels == -1)).any(axis=1)
