"""Anybody's own data: a table with an image path and labels in every row.

Labels are a column a class (1 positive, 0 negative, empty unknown; other words by choice) or one
column of label lists. Unknown cells stay unknown: they are what the method is for.
"""

import collections
import csv
import dataclasses
import io
import itertools
import os
import pathlib
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from clsl_jax.data import inspection
from clsl_jax.data.formats import listing
from clsl_jax.data.formats.listing import ImageList, Listing
from clsl_jax.data.formats.table_file import (
    LIST_SEPARATOR,
    SPREADSHEETS,
    SUFFIXES,
    Table,
    read_table,
)
from clsl_jax.data.splits import SPLITS
from clsl_jax.errors import InputError, printable

# What a cell may say, as `plain` has it; those of WORDS only if chosen.
CELLS = {"1": 1, "0": 0, "": -1}
WORDS = {
    "yes/no": {"yes": 1, "no": 0},
    "true/false": {"true": 1, "false": 0},
    "?": {"?": -1},
    "-1": {"-1": -1},
}
_VALUES = {"1": 1, "0": 0, "?": -1}
# What other words are likely to mean; ? for any other, which teaches nothing wrong.
_USUAL = {
    **dict.fromkeys(("x", "y", "t", "ja", "j", "oui", "si", "sí", "wahr", "100%", "100 %"), "1"),
    **dict.fromkeys(("present", "positive", "pos", "vorhanden"), "1"),
    **dict.fromkeys(("n", "f", "nein", "non", "falsch", "0%", "0 %"), "0"),
    **dict.fromkeys(("absent", "negative", "neg", "fehlt"), "0"),
    **dict.fromkeys(("na", "n/a", "#n/a", "nan", "null", "none", "unknown", "-", "?"), "?"),
}
_WHOLE = re.compile(r"(-?[01])(?:\.0*|,0{0,2})")  # 1,000 is a thousand
# More words than this are no labels; and what can stand in --cells as it is.
_WORDS_SHOWN, _FREE_WORD = 6, re.compile(r"[^,'\"=]{1,30}")
_SEPARATORS = (LIST_SEPARATOR, ",", "|", "/")
# A list as a program prints it, which has no separator alone.
_PRINTED_LIST = re.compile(r"\[\s*((['\"]).*\2\s*)?\]", re.DOTALL)
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
FAULTS_SHOWN = 50
# Missing images that are looked for by name, and files among which they are.
_LOOKED_FOR, _FILES_SEEN = 5, 200_000


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
    separator: str = LIST_SEPARATOR
    ignored: tuple[str, ...] = ()


_BY_NAME = Columns()


def plain(cell: str) -> str:
    """Returns the key of a cell in `CELLS`: small letters, and 1 for 1.0, 1,00 and "1."."""
    number = _WHOLE.fullmatch(cell)
    return number[1] if number else cell.lower()


def meanings(words: Sequence[str]) -> dict[str, int]:
    """Returns what cells mean: `CELLS`, and `words`, each of `WORDS` or WORD=1, WORD=0, WORD=?.

    Raises:
      InputError: an entry is none of these, or gives a word a second meaning.
    """
    found = dict(CELLS)
    for entry in words:
        word, value = (part.strip() for part in entry.rpartition("=")[::2])
        if entry in WORDS:
            meaning = WORDS[entry]
        elif word and value in _VALUES:
            meaning = {plain(word): _VALUES[value]}
        else:
            raise InputError(
                f"--cells={entry!r} is unknown; choose of {', '.join(WORDS)}, or say what a word "
                "means: WORD=1 (it is there), WORD=0 (it is not) or WORD=? (unknown)."
            )
        for key, label in meaning.items():
            if found.setdefault(key, label) != label:
                raise InputError(f"--cells={entry!r}: {key!r} has another meaning already.")
    return found


def find_table(source: pathlib.Path) -> pathlib.Path:
    """Returns the table: `source` itself, or the only one in that folder, or its only spreadsheet.

    Raises:
      InputError: there is none, or there are several.
    """
    if os.path.isfile(source):
        return source
    inside = sorted(source.glob("*")) if os.path.isdir(source) else []
    # Hidden files and ~$labels.csv are what programs leave beside a table.
    inside = [path for path in inside if not path.name.startswith((".", "~$"))]
    found = [path for path in inside if path.suffix.lower() in SUFFIXES]
    found = found or [path for path in inside if path.suffix.lower() in SPREADSHEETS]
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
    may_break: bool = False,
) -> Listing:
    """Lists the images of a table.

    Args:
      source: the table, or the folder that holds it.
      columns: which column says what.
      words: as of `meanings`: what cells may say beside 1, 0 and nothing; capitals do not matter.
      unlisted: what a label is that a list does not name: `negative` or `unknown`.
      empty: what an empty cell says of its class, or an empty list of all: `unknown` or `negative`.
      class_names: for lists: text file with the labels that there are, in order; by default all
        that occur, by alphabet.
      images: folder of the images; by default the table's own.
      may_miss: an image that is not there is no wrong cell.
      may_break: nor is one that cannot be read.

    Returns:
      A listing whose splits are those of the split column, or `train` alone.

    Raises:
      InputError: columns or files are missing, or cells are wrong: all of them, each by file, row,
        column, value and the values allowed.
    """
    if class_names is not None and not columns.labels:
        raise InputError("--class_names is for label lists: name their column by --labels_column.")
    if not columns.separator:
        raise InputError("--label_separator is empty; expected what separates labels, such as ';'.")
    meaning = meanings(words)
    table = read_table(find_table(source))
    image = _column(table, columns.image, IMAGE_COLUMNS, "--image_column")
    split = _column(table, columns.split, SPLIT_COLUMNS, "--split_column", optional=True)
    faults = _Faults(table)
    notes: list[str] = []
    if columns.labels:
        column = _column(table, columns.labels, (), "--labels_column")
        names, labels = _read_lists(
            table, column, columns.separator, unlisted, empty, class_names, faults
        )
        _note_separator(table, column, columns.separator, notes)
    else:
        ignored = {_column(table, name, (), "--ignore_columns") for name in columns.ignored}
        if table.has_index:
            ignored.add(0)
            notes.append("The first column has no name and counts the rows: passed over.")
        of_class = [c for c in range(len(table.columns)) if c not in {image, split} | ignored]
        names = tuple(table.columns[c] for c in of_class)
        if "" in names:
            raise InputError(
                f"{table.path}: column {of_class[names.index('')] + 1} has no name; its columns "
                f"are {table.header}. Name it, or delete it."
            )
        labels = _read_cells(table, of_class, meaning, words, empty, faults)
    rows_of = _read_splits(table, split, faults)
    folder = images or table.path.parent
    paths, ids = _read_images(table, image, folder, may_miss, faults)
    if faults and not may_break:
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
        notes=notes,
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
            rows = [row for row, _ in faults[:FAULTS_SHOWN]]
            where = f" in column {self._table.columns[column]!r}"
            texts = first_faults([text for _, text in faults], where)
            # What is left out is told behind the last one shown.
            lines += itertools.zip_longest(rows, texts, fillvalue=rows[-1])
        count = sum(map(len, self._found.values()))
        told = [text for _, text in sorted(lines, key=lambda line: line[0])]
        raise unusable(self._table, count, "cell", told, self._hints)


def first_faults(faults: Sequence[str], where: str = "") -> list[str]:
    """Returns the first of them, and after those how many more there are."""
    more = len(faults) - FAULTS_SHOWN
    return [*faults[:FAULTS_SHOWN], *([f"… and {more:,} more{where}"] if more > 0 else [])]


def unusable(
    table: Table, count: int, what: str, told: Sequence[str], hints: Sequence[str] = ()
) -> InputError:
    """Returns the error of a table.

    Args:
      table: read.
      count: how many cells, or other things, are at fault.
      what: one of them is called.
      told: what is said of them, a line each.
      hints: sentences, told below.
    """
    things = f"1 {what}" if count == 1 else f"{count:,} {what}s"
    lines = "\n".join([*(f"  {text}" for text in told), *hints])
    return InputError(f"{table.path}: {things} cannot be used:\n{lines}")


def _column(
    table: Table, name: str, usual: Sequence[str], flag: str, optional: bool = False
) -> int | None:
    if name:
        if name not in table.columns:
            raise InputError(
                f"{table.path} has no column {name!r} ({flag}); its columns are {table.header}."
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
        f"paths by {flag}. Its columns are {table.header}."
    )


def _read_cells(
    table: Table,
    of_class: Sequence[int],
    meaning: Mapping[str, int],
    words: Sequence[str],
    empty: str,
    faults: _Faults,
) -> np.ndarray:
    if empty == "negative":
        meaning = {**meaning, "": 0}
    expected = f"expected {', '.join(filter(None, meaning))} or an empty cell"
    labels = np.full((len(table.rows), len(of_class)), -1, np.int8)
    wrong: dict[int, list[str]] = {}
    for row, cells in enumerate(table.rows):
        for place, column in enumerate(of_class):
            label = meaning.get(plain(cells[column]))
            if label is None:
                faults.add(row, column, expected)
                wrong.setdefault(column, []).append(cells[column])
            else:
                labels[row, place] = label
    _hint(table, wrong, words, faults)
    return labels


def _hint(
    table: Table, wrong: Mapping[int, Sequence[str]], words: Sequence[str], faults: _Faults
) -> None:
    """Says what to do about wrong cells, {column: cells}, where the table shows what is meant."""
    within = {column: set(map(plain, cells)) for column, cells in wrong.items()}
    columns = collections.Counter(itertools.chain.from_iterable(within.values()))
    known = {word for meaning in WORDS.values() for word in meaning}
    # Words of several columns are what labels are called there, if they are few.
    meant = {word for word, count in columns.items() if count > 1}
    meant = meant if len(meant) <= _WORDS_SHOWN else set()
    if columns.keys() <= meant | known | _USUAL.keys():
        meant = set(columns)
    needed = [name for name, meaning in WORDS.items() if meant & meaning.keys()]
    spelled = {plain(cell): cell for cells in wrong.values() for cell in cells}
    free = [spelled[word] for word in sorted(meant - known)]
    if not all(word.isprintable() and _FREE_WORD.fullmatch(word) for word in free):
        meant = set()
    if meant:
        given = [*words, *needed, *(f"{word}={_USUAL.get(plain(word), '?')}" for word in free)]
        asked = "If that is what these cells mean"
        if free:
            asked = "Say what these words mean, 1, 0 or ? (unknown), perhaps so"
        faults.hint(f"{asked}: --cells='{','.join(given)}'")
    foreign = []
    for column, cells in wrong.items():
        unexplained = sum(plain(cell) not in meant for cell in cells)
        if 2 * unexplained > sum(bool(row[column]) for row in table.rows):  # no slips of the pen
            foreign.append(table.columns[column])
    if foreign:
        one = f"column {foreign[0]!r} is no class"
        several = f"columns {', '.join(map(repr, foreign))} are no classes"
        ignored = io.StringIO()
        csv.writer(ignored, lineterminator="").writerow(foreign)
        faults.hint(
            f"If {one if len(foreign) == 1 else several}: --ignore_columns="
            f"{shlex.quote(ignored.getvalue())}; if {'it' if len(foreign) == 1 else 'one'} lists "
            f"the labels of an image: --labels_column={shlex.quote(foreign[0])}"
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
        words = {*CELLS, *itertools.chain.from_iterable(WORDS.values())}
        if names and words.issuperset(map(plain, names)):
            raise InputError(
                f"{table.path}: column {table.columns[column]!r} (--labels_column) lists no labels "
                f"but {', '.join(map(repr, names))}, as the column of one class does. Leave the "
                "flag out to read a column a class; or name the labels by --class_names."
            )
    index = {name: place for place, name in enumerate(names)}
    labels = np.full((len(lists), len(names)), -1, np.int8)
    for row, found in enumerate(lists):
        if (unlisted if found else empty) == "negative":
            labels[row] = 0
        if _PRINTED_LIST.fullmatch(table.rows[row][column]):
            faults.add(row, column, f"expected labels with {separator!r} between them, no brackets")
            continue
        for label in found:
            if label in index:
                labels[row, index[label]] = 1
            else:
                faults.add(row, column, f"{label!r} is not in {class_names}")
    return names, labels


def _note_separator(table: Table, column: int, separator: str, notes: list[str]) -> None:
    """Notes if label lists seem to have another separator than the one given."""
    lists = [row[column] for row in table.rows if row[column]]
    if any(separator in found for found in lists):
        return
    counts = {other: sum(other in found for found in lists) for other in _SEPARATORS}
    other = max(counts, key=counts.__getitem__)
    if counts[other] >= max(2, len(lists) / 10):
        notes.append(
            f"None of the {len(lists):,} label lists has the separator {separator!r}, but "
            f"{counts[other]:,} have {other!r}. If it separates labels: --label_separator='{other}'"
        )


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
    missing: list[str] = []
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
            missing.append(name)
        first.setdefault(name, row)
    if 2 * len(missing) > len(ids) and (found := _find_elsewhere(missing, folder)):
        faults.hint(found)
    if len(missing) > FAULTS_SHOWN:
        faults.hint("To go on without images that are missing: --leave_out=missing")
    return paths, ids


def _find_elsewhere(missing: Sequence[str], folder: pathlib.Path) -> str | None:
    """Returns how one of the first missing images is found by its name below a folder, if it is."""
    places: dict[str, list[str]] = {}
    for name in itertools.islice(_files(folder), _FILES_SEEN):
        path = pathlib.PurePosixPath(name)
        for key in {_key(path.name), _key(path.stem)}:
            places.setdefault(key, []).append(name)
    for name in missing[:_LOOKED_FOR]:
        found = places.get(_key(pathlib.PurePosixPath(name).name), [])
        if found:
            place = min(found, key=lambda place: not place.endswith(f"/{name}"))
            return f"{name!r} is found as {place!r}: {_difference(name, place, folder, missing)}"
    return None


def _difference(name: str, found: str, folder: pathlib.Path, missing: Sequence[str]) -> str:
    """Returns what to do where an image `name` lies as `found` below a folder."""
    if found.endswith(f"/{name}"):
        inner = folder / found.removesuffix(f"/{name}")
        can_be_written = printable(str(inner)) == str(inner)
        there = sum(os.path.isfile(inner / other) for other in missing)
        if can_be_written and 2 * there > len(missing):
            return f"--images={shlex.quote(str(inner))}"
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", found):
        return "letters such as é are put together otherwise there (Unicode NFC and NFD)"
    if _key(name) == _key(found):
        return "write capitals and small letters as the files have them"
    if _key(name) == _key(str(pathlib.PurePosixPath(found).with_suffix(""))):
        return "write the endings of the files, too"
    return f"write paths below {printable(str(folder))}"


def _files(folder: pathlib.Path) -> Iterator[str]:
    """Yields the files below a folder, as paths below it with slashes."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        below = pathlib.Path(root).relative_to(folder)
        yield from ((below / name).as_posix() for name in sorted(names))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _find_unreadable(paths: Sequence[pathlib.Path], column: int, faults: _Faults) -> None:
    there = [row for row, path in enumerate(paths) if os.path.isfile(path)]
    found = inspection.inspect_images([paths[row] for row in there], workers=os.cpu_count() or 1)
    for row, facts in zip(there, found, strict=True):
        if facts.state == inspection.UNREADABLE:
            faults.add(row, column, f"the file is damaged ({facts.reason}); expected an image")
