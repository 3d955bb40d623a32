"""CSV, TSV and Parquet files as rows of text cells."""

import contextlib
import csv
import dataclasses
import io
import itertools
import math
import pathlib
import re
import statistics
from typing import Any

from clsl_jax.errors import InputError, listed

SUFFIXES = (".csv", ".tsv", ".parquet")
LIST_SEPARATOR = ";"
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Excel's first line in place of a setting.
_SEPARATOR_LINE = re.compile(r"\"?sep=([^\w\s\"\0]|\t)\"?[,;]*(\r\n?|\n|\Z)", re.IGNORECASE)
_ROWS_TRIED = 50  # of a file whose separator is to be found
_END = "end"
_NO_NAMES = "If that row does not name the columns, delete it, or write one that does above it."
# Each row of a table names another image, which a Parquet file cannot do for nothing.
_ROWS, _ROWS_A_BYTE = 100_000, 8


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
      path: of the file.
      columns: names of the columns, all different.
      rows: N rows of a cell a column, without outer blanks.
      first_row: number of the first row as a spreadsheet shows it: 2 below a header line.
    """

    path: pathlib.Path
    columns: list[str]
    rows: list[list[str]]
    first_row: int

    @property
    def header(self) -> str:
        """The names of the columns, and where they are from, for a message."""
        return _header(self.columns) + (" (its first row)" if self.first_row > 1 else "")

    @property
    def has_index(self) -> bool:
        """Whether the first column has no name and a number for each row, as pandas writes it."""
        numbers = {row[0] for row in self.rows} if self.columns[0] == "" else set()
        return len(numbers) == len(self.rows) and all(map(str.isdecimal, numbers))


def read_table(path: pathlib.Path) -> Table:
    """Reads a table by its file name's ending.

    The separator of a CSV is the one of comma, semicolon, tab and bar by which its first rows have
    the same number of cells, most of them if there are several; or that of a first line `sep=;`. A
    list in a cell of Parquet is read as its parts with `LIST_SEPARATOR` between them.

    Raises:
      InputError: no such file, an unknown ending, no header, no rows, rows of another length than
        the header, a quote that is not closed.
    """
    suffix = path.suffix.lower()
    if suffix in SPREADSHEETS:
        raise InputError(f"{path}: save it as CSV UTF-8; expected one of {', '.join(SUFFIXES)}.")
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}.")
    table = _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
    if not table.rows:
        raise InputError(f"{path} has no rows below its header.")
    seen: set[str] = set()
    twice = sorted({name for name in table.columns if name in seen or seen.add(name)})
    if twice:
        advice = f" {_NO_NAMES}" if table.first_row > 1 else ""
        raise InputError(
            f"{path} has two columns of the name {twice[0]!r}; its columns are {table.header}. "
            f"Each needs a name of its own.{advice}"
        )
    return table


def _header(columns: list[str]) -> str:
    return listed([repr(name) for name in columns], 20)


def _read_text(path: pathlib.Path, suffix: str) -> Table:
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark in front of the first name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as CSV UTF-8."
        ) from None
    stated = _SEPARATOR_LINE.match(text)
    if stated:
        text, separator = text[stated.end() :], stated[1]
    else:
        separator = "\t" if suffix == ".tsv" else _find_separator(text)
    lines = _parse(path, text, separator, first_line=2 if stated else 1)
    while lines and not any(lines[-1]):
        lines.pop()
    if not lines or not any(lines[0]):
        raise InputError(f"{path} has no header: the first line must name the columns.")
    columns = lines[0]
    wrong = [
        f"row {number} has {len(line)} cells"
        for number, line in enumerate(lines[1:], start=2)
        if len(line) != len(columns)
    ]
    if wrong:
        advice = "A cell that contains the separator must be in double quotes."
        if len(wrong) > len(lines) / 2:
            advice = _NO_NAMES
        raise InputError(
            f"{path} has {len(columns)} columns by its first row ({_header(columns)}), separated "
            f"by {_SEPARATORS.get(separator, repr(separator))}, but {listed(wrong, 10)}. {advice}"
        )
    # Commas at the ends of lines make columns of nothing.
    full = [c for c, name in enumerate(columns) if name or any(line[c] for line in lines[1:])]
    rows = [[line[c] for c in full] for line in lines[1:]]
    return Table(path, [columns[c] for c in full], rows, first_row=2)


def _find_separator(text: str) -> str:
    """Returns the separator by which the first rows have an equal number of cells, and most.

    If there is none, the one by which most of them have as many as the header.
    """

    def fit(separator: str) -> tuple[bool, bool, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        widths: list[int] = []
        with contextlib.suppress(csv.Error):  # of a quote that is not closed, told later
            for row in itertools.islice(filter(None, reader), _ROWS_TRIED):
                widths.append(len(row))
        usual = statistics.mode(widths) if widths else 0
        headed = usual > 1 and widths[0] == usual and 2 * widths.count(usual) > len(widths)
        return usual > 1 and len(set(widths)) == 1, headed, usual

    # Of equals the comma: a single column has no separator at all.
    return max(_SEPARATORS, key=fit)


def _parse(path: pathlib.Path, text: str, separator: str, first_line: int) -> list[list[str]]:
    """Returns the rows of a text, each cell without outer blanks.

    Raises:
      InputError: a quote is not closed; says in which line of the file it is opened.
    """
    text += "" if text.endswith(("\r", "\n")) else "\n"
    # A quote that is not closed runs on into a last line of ours.
    reader = csv.reader(io.StringIO(text + _END, newline=""), delimiter=separator)
    rows: list[list[str]] = []
    done = 0
    try:
        for row in reader:
            rows.append(row)
            done = reader.line_num
    except csv.Error as error:
        raise InputError(
            f"{path} cannot be read as a table ({error}): is a double quote not closed that is "
            f"opened in line {done + first_line}, or below?"
        ) from None
    if rows.pop() != [_END]:
        inside = len(list(io.StringIO(row[-1], newline="")))
        raise InputError(
            f"{path}: the double quote that is opened in line "
            f"{reader.line_num - inside + first_line} is not closed: close it, or delete it."
        )
    return [[cell.strip() for cell in row] for row in rows]


def _read_parquet(path: pathlib.Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        count = pyarrow.parquet.read_metadata(path).num_rows
        # Nothing takes no room there, and any number of rows of it would fill the memory here.
        if count > _ROWS + _ROWS_A_BYTE * path.stat().st_size:
            raise InputError(f"{path} says that it has {count:,} rows, more than such a file can.")
        content = pyarrow.parquet.read_table(path)
        names = [name.strip() for name in content.column_names]
        columns = [[_text(cell) for cell in column.to_pylist()] for column in content.columns]
    except InputError:
        raise
    # Text that is no UTF-8, and times that Python has not, are found only when they are asked for;
    # a list may have what it is not divided by.
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({error}): write it again with columns of text and "
            "whole numbers."
        ) from None
    return Table(path, names, [list(row) for row in zip(*columns, strict=True)], 1)


def _text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "replace").strip()
    if isinstance(cell, list):
        parts = [_text(part) for part in cell]
        if wrong := [part for part in parts if LIST_SEPARATOR in part]:
            raise ValueError(f"a list has {wrong[0]!r}, and {LIST_SEPARATOR!r} is between labels")
        return LIST_SEPARATOR.join(parts)
    return str(cell).strip()
