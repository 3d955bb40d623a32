"""Anybody's own data: a table with an image path and labels in every row.

Labels are a column a class (1 positive, 0 negative, empty unknown; other words by choice) or one
column of label lists. Unknown cells stay unknown: they are what the method is for.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from clsl_jax.data import inspection
from clsl_jax.data.formats import listing
from clsl_jax.data.formats.listing import ImageList, Listing
from clsl_jax.data.formats.table_file import SUFFIXES, Table, read_table
from clsl_jax.data.splits import SPLITS
from clsl_jax.errors import InputError

# What a cell may say; those of WORDS only if chosen. "1.0": pandas writes columns with gaps so.
CELLS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": -1}
WORDS = {
    "yes/no": {"yes": 1, "no": 0},
    "true/false": {"true": 1, "false": 0},
    "?": {"?": -1},
    "-1": {"-1": -1, "-1.0": -1},
}
UNLISTED = ("negative", "unknown")
EMPTY = ("unknown", "negative")
IMAGE_COLUMNS = ("image", "image_path", "path", "file", "filename", "file_name")
SPLIT_COLUMNS = ("split", "subset")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
# Columns of the tables that a run writes, beside those of its classes.
_TAKEN = ("image", "split")
# A column with more wrong cells than this is probably no class at all.
_CELLS_SHOWN = 50


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column says what; empty: found by its name.

    Attributes:
      image: of image paths, absolute or below `images`; by default `image`, `path`, `file`, …
      split: of `train`, `validation` or `test`; by default `split` if there is one.
      labels: of label lists; then there are no class columns.
      separator: between the labels of a list.
      ignored: that are neither.
    """

    image: str = ""
    split: str = ""
    labels: str = ""
    separator: str = ";"
    ignored: tuple[str, ...] = ()


_BY_NAME = Columns()


def find_table(source: pathlib.Path) -> pathlib.Path:
    """Returns the table: `source` itself, or the only one in that folder.

    Raises:
      InputError: there is none, or there are several.
    """
    if os.path.isfile(source):
        return source
    inside = source.glob("*") if os.path.isdir(source) else ()
    found = sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            f"{source}: expected one table ({', '.join(SUFFIXES)}), found {names}; give "
            "--source=FILE."
        )
    return found[0]


def read_own_table(
    source: pathlib.Path,
    *,
    columns: Columns = _BY_NAME,
    words: Sequence[str] = (),
    unlisted: str = "negative",
    empty: str = "unknown",
    class_names: pathlib.Path | None = None,
    images: pathlib.Path | None = None,
    may_miss: bool = False,
) -> Listing:
    """Lists the images of a table.

    Args:
      source: the table, or the folder that holds it.
      columns: which column says what.
      words: of `WORDS`: what cells may say beside 1, 0 and nothing; capitals do not matter.
      unlisted: what a label is that a list does not name: `negative` or `unknown`.
      empty: what an empty cell says of its class, or an empty list of all: `unknown` or `negative`.
      class_names: for lists: text file with the labels that there are, in order; by default all
        that occur, by alphabet.
      images: folder of the images; by default the table's own.
      may_miss: an image that is not there is no wrong cell.

    Returns:
      A listing whose splits are those of the split column, or `train` alone.

    Raises:
      InputError: columns or files are missing, or cells are wrong: all of them, each by file, row,
        column, value and the values allowed.
    """
    if class_names is not None and not columns.labels:
        raise InputError("--class_names is for label lists: name their column by --labels_column.")
    table = read_table(find_table(source))
    image = _column(table, columns.image, IMAGE_COLUMNS, "--image_column")
    split = _column(table, columns.split, SPLIT_COLUMNS, "--split_column", optional=True)
    faults = _Faults(table)
    if columns.labels:
        column = _column(table, columns.labels, (), "--labels_column")
        names, labels = _read_lists(
            table, column, columns.separator, unlisted, empty, class_names, faults
        )
    else:
        ignored = {_column(table, name, (), "--ignore_columns") for name in columns.ignored}
        of_class = [c for c in range(len(table.columns)) if c not in {image, split} | ignored]
        names = tuple(table.columns[c] for c in of_class)
        labels = _read_cells(table, of_class, words, empty, faults)
    rows_of = _read_splits(table, split, faults)
    folder = images or table.path.parent
    paths, ids = _read_images(table, image, folder, may_miss, faults)
    if faults:
        # Seldom, and worth the time: whoever has to mend the table wants to do it once.
        _find_unreadable(paths, image, faults)
    faults.raise_if_any()
    if not names:
        raise InputError(f"{table.path} has no class: no column is left for one.")
    if taken := [name for name in _TAKEN if name in names]:
        raise InputError(
            f"{table.path}: a class is called {taken[0]!r}, as a column of the tables that a run "
            "writes: give it another name."
        )
    whole = ImageList(paths, ids, labels)
    return Listing(
        name="table",
        class_names=names,
        splits={name: whole.rows(rows) for name, rows in rows_of.items()},
        description=f"{table.path.name}: {len(paths)} images, {len(names)} classes.",
    )


class _Faults:
    """Collects every wrong cell, so that a user sees all of them at once."""

    def __init__(self, table: Table):
        self._table = table
        self._found: dict[int, list[tuple[int, str]]] = {}
        self._hints: list[str] = []

    def hint(self, text: str) -> None:
        """Adds what may be done about some of them, a sentence; told below all."""
        self._hints.append(text)

    def add(self, row: int, column: int, expected: str) -> None:
        cell = self._table.rows[row][column]
        number = self._table.first_row + row
        where = f"row {number}, column {self._table.columns[column]!r}"
        self._found.setdefault(column, []).append((number, f"{where}: {cell!r}; {expected}"))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        if not self._found:
            return
        lines: list[tuple[int, str]] = []
        for column, faults in self._found.items():
            lines += faults[:_CELLS_SHOWN]
            if more := faults[_CELLS_SHOWN:]:
                text = f"… and {len(more)} more in column {self._table.columns[column]!r}"
                lines.append((faults[_CELLS_SHOWN - 1][0], text))
        count = sum(map(len, self._found.values()))
        cells = "1 cell" if count == 1 else f"{count} cells"
        listed = "\n  ".join(text for _, text in sorted(lines, key=lambda line: line[0]))
        hints = "".join(f"\n{hint}" for hint in self._hints)
        raise InputError(f"{self._table.path}: {cells} cannot be used:\n  {listed}{hints}")


def _column(
    table: Table, name: str, usual: Sequence[str], flag: str, optional: bool = False
) -> int | None:
    if name:
        if name not in table.columns:
            raise InputError(
                f"{table.path} has no column {name!r} ({flag}); its columns are "
                f"{', '.join(map(repr, table.columns))}."
            )
        return table.columns.index(name)
    lowered = [column.lower() for column in table.columns]
    for candidate in usual:
        if candidate in lowered:
            return lowered.index(candidate)
    if optional:
        return None
    raise InputError(
        f"{table.path}: no column is called {', '.join(usual)}; say which one holds the image "
        f"paths by {flag}. Its columns are {', '.join(map(repr, table.columns))}."
    )


def _read_cells(
    table: Table, of_class: Sequence[int], words: Sequence[str], empty: str, faults: _Faults
) -> np.ndarray:
    meaning = dict(CELLS)
    for word in words:
        meaning |= WORDS[word]
    if empty == "negative":
        meaning[""] = 0
    allowed = [word for word in meaning if word and not word.endswith(".0")]
    expected = f"expected {', '.join(allowed)} or an empty cell"
    labels = np.full((len(table.rows), len(of_class)), -1, np.int8)
    wrong: dict[int, list[str]] = {}
    for row, cells in enumerate(table.rows):
        for place, column in enumerate(of_class):
            label = meaning.get(cells[column].lower())
            if label is None:
                faults.add(row, column, expected)
                wrong.setdefault(column, []).append(cells[column].lower())
            else:
                labels[row, place] = label
    _hint(table, wrong, words, faults)
    return labels


def _hint(
    table: Table, wrong: Mapping[int, Sequence[str]], words: Sequence[str], faults: _Faults
) -> None:
    """Says what to do about wrong cells, {column: cells}, where the table shows what is meant."""
    found = {cell for cells in wrong.values() for cell in cells}
    needed = [name for name, meaning in WORDS.items() if found & meaning.keys()]
    if needed and found <= {word for name in needed for word in WORDS[name]}:
        faults.hint(f"If that is what these cells mean: --cells='{','.join([*words, *needed])}'")
        return
    for column, cells in wrong.items():
        filled = sum(bool(row[column]) for row in table.rows)
        if 2 * len(cells) > filled:  # not a slip of the pen
            name = table.columns[column]
            faults.hint(
                f"If column {name!r} is no class: --ignore_columns={name}; if it lists the labels "
                f"of an image: --labels_column={name}"
            )


def _read_lists(
    table: Table,
    column: int,
    separator: str,
    unlisted: str,
    empty: str,
    class_names: pathlib.Path | None,
    faults: _Faults,
) -> tuple[tuple[str, ...], np.ndarray]:
    lists = [
        [label for label in map(str.strip, cells[column].split(separator)) if label]
        for cells in table.rows
    ]
    if class_names is not None:
        names = tuple(listing.read_lines(class_names))
        listing.check_unique(names, str(class_names), "classes")
    else:
        names = tuple(sorted({label for found in lists for label in found}))
    index = {name: place for place, name in enumerate(names)}
    labels = np.full((len(lists), len(names)), -1, np.int8)
    for row, found in enumerate(lists):
        if (unlisted if found else empty) == "negative":
            labels[row] = 0
        for label in found:
            if label in index:
                labels[row, index[label]] = 1
            else:
                faults.add(row, column, f"{label!r} is not in {class_names}")
    return names, labels


def _read_splits(table: Table, column: int | None, faults: _Faults) -> dict[str, list[int]]:
    if column is None:
        return {"train": list(range(len(table.rows)))}
    rows_of: dict[str, list[int]] = {}
    for row, cells in enumerate(table.rows):
        split = _SPLITS.get(cells[column].lower())
        if split is None:
            faults.add(row, column, "expected train, validation or test")
        else:
            rows_of.setdefault(split, []).append(row)
    return {name: rows_of[name] for name in SPLITS if name in rows_of}


def _read_images(
    table: Table, column: int, folder: pathlib.Path, may_miss: bool, faults: _Faults
) -> tuple[list[pathlib.Path], list[str]]:
    ids = [cells[column].replace("\\", "/") for cells in table.rows]
    paths = [folder / name for name in ids]
    first: dict[str, int] = {}
    missing = 0
    for row, name in enumerate(ids):
        if not name or "\0" in name:
            faults.add(row, column, "expected the path of an image")
        elif name in first:
            number = table.first_row + first[name]
            faults.add(
                row, column, f"row {number} has the same image; expected one row for each image"
            )
        elif not may_miss and not os.path.isfile(paths[row]):
            expected = f"no such file; expected the path of an image below {folder}"
            faults.add(row, column, expected)
            missing += 1
        first.setdefault(name, row)
    if missing > _CELLS_SHOWN:
        faults.hint("To go on without images that are missing: --leave_out=missing")
    return paths, ids


def _find_unreadable(paths: Sequence[pathlib.Path], column: int, faults: _Faults) -> None:
    there = [row for row, path in enumerate(paths) if os.path.isfile(path)]
    found = inspection.inspect_images([paths[row] for row in there], workers=os.cpu_count() or 1)
    for row, facts in zip(there, found, strict=True):
        if facts.state == inspection.UNREADABLE:
            faults.add(row, column, f"the file is damaged ({facts.reason}); expected an image")
