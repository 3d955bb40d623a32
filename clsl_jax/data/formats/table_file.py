"""CSV, TSV and Parquet files as rows of text cells."""

import csv
import dataclasses
import math
import pathlib
from typing import Any

from clsl_jax.errors import InputError, listed

SUFFIXES = (".csv", ".tsv", ".parquet")
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


def read_table(path: pathlib.Path) -> Table:
    """Reads a table by its file name's ending.

    A CSV's separator is the comma, semicolon or tab that its first line has most of.

    Raises:
      InputError: no such file, an unknown ending, no header, no rows, rows of another length than
        the header.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}.")
    table = _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
    if not table.rows:
        raise InputError(f"{path} has no rows below its header.")
    seen: set[str] = set()
    twice = sorted({name for name in table.columns if name in seen or seen.add(name)})
    if twice:
        raise InputError(f"{path} has two columns of the name {twice[0]!r}.")
    return table


def _read_text(path: pathlib.Path, suffix: str) -> Table:
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark in front of the first name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # Of equals the comma: a single column has no separator at all.
            delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=first.count)
            lines = [
                [cell.strip() for cell in line] for line in csv.reader(file, delimiter=delimiter)
            ]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as CSV UTF-8."
        ) from None
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}).") from None
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
        raise InputError(
            f"{path} has {len(columns)} columns, but {listed(wrong, 10)}. A cell that "
            "contains the separator must be in double quotes."
        )
    # Commas at the ends of lines make columns of nothing.
    full = [c for c, name in enumerate(columns) if name or any(line[c] for line in lines[1:])]
    rows = [[line[c] for c in full] for line in lines[1:]]
    return Table(path, [columns[c] for c in full], rows, first_row=2)


def _read_parquet(path: pathlib.Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        count = pyarrow.parquet.read_metadata(path).num_rows
        # Nothing takes no room there, and any number of rows of it would fill the memory here.
        if count > _ROWS + _ROWS_A_BYTE * path.stat().st_size:
            raise InputError(f"{path} says that it has {count:,} rows, more than such a file can.")
        content = pyarrow.parquet.read_table(path)
        names = content.column_names
        columns = [[_text(cell) for cell in column.to_pylist()] for column in content.columns]
    except InputError:
        raise
    # Text that is no UTF-8, and times that Python has not, are found only when they are asked for.
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
    return str(cell).strip()
