"""Class names and the text that an encoder reads for each of them."""

import dataclasses

from clsl_jax.errors import InputError

# Names of PASCAL VOC that are two words written as one.
_WRITTEN_AS_ONE = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}


@dataclasses.dataclass(frozen=True)
class Label:
    """A class.

    Attributes:
      name: as the data set writes it.
      text: what the encoder reads.
    """

    name: str
    text: str


def label_text(name: str) -> str:
    """Returns a class name as words: `diningtable` -> `dining table`, `hot_dog` -> `hot dog`."""
    words = " ".join(name.replace("_", " ").split())
    return _WRITTEN_AS_ONE.get(words.lower(), words)


def read_labels(path: str) -> list[Label]:
    """Reads the classes of a label list, one a line, in the order of the model's outputs.

    A line is a class name, or a class name, a tab and the text to embed in its place.

    Args:
      path: UTF-8 text file; empty lines do not count.

    Raises:
      InputError: the file cannot be read, holds no class or a class twice.
    """
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark in front of the first name.
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise InputError(f"The label list {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"The label list {path} is not UTF-8 text (byte {error.start}): "
            "give a text file with one class name a line."
        ) from None
    labels: list[Label] = []
    first_line: dict[str, int] = {}
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, text = (part.strip() for part in line.partition("\t"))
        if not name:
            faults.append(f"line {number}: no class name before the tab")
        elif tab and not text:
            text = label_text(name)
        if name in first_line:
            faults.append(f"line {number}: {name!r} stands already in line {first_line[name]}")
        first_line.setdefault(name, number)
        labels.append(Label(name, text or label_text(name)))
    if not labels:
        faults.append("no class name in it; expected one a line")
    if faults:
        raise InputError(f"The label list {path} cannot be used: " + "; ".join(faults) + ".")
    return labels
