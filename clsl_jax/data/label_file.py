"""Known labels from a file of one's own: a mask of the set's labels, or a table of other ones.

A mask has a row for each training image, in the order of the split, and a column for each class. A
table names its images and classes, in any order; what it says may contradict the set's own labels,
as a second annotator's or a noisy source's would.
"""

import difflib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from clsl_jax import npz
from clsl_jax.data import partial
from clsl_jax.data.formats.table import (
    CELLS,
    FAULTS_SHOWN,
    IMAGE_COLUMNS,
    SPLIT_COLUMNS,
    first_faults,
    plain,
    unusable,
)
from clsl_jax.data.formats.table_file import SUFFIXES, Table, read_table
from clsl_jax.errors import InputError

_ID_COLUMNS = (*IMAGE_COLUMNS, "id", "image_id", "name")
_EXPECTED = "expected 1, 0 or an empty cell"


def read_label_file(
    path: str | os.PathLike,
    *,
    ids: Sequence[str],
    class_names: Sequence[str],
    labels: np.ndarray,
) -> np.ndarray:
    """Reads which labels of a training split are known, and for a table what they are.

    Args:
      path: by its ending
        `.npz`: a mask as a run writes it (`known_mask.npz`);
        `.npy`: a mask [N, C] of booleans, or of integers 1 (known) and 0;
        `.csv`, `.tsv`, `.parquet`: a column of image ids (`image`, `path`, `file`, `id`, ..., else
          the first one) and a column a class, with 1, 0, or nothing where a label is unknown. A
          class without a column and an image without a row are unknown. Images of other splits and
          a column `split` are passed over, so that a run's `recovered.csv` can be read.
      ids: N names of the training images.
      class_names: C names.
      labels: int8 [N, C], 1 / 0 / -1: the set's own; a mask shows some of them, a table none.

    Returns:
      Annotations int8 [N, C]: 1 positive, 0 negative, -1 unknown.

    Raises:
      InputError: the file cannot be read, is of another shape, names no training image, or has
        cells, rows or columns that cannot be used: all of them, each with what is allowed.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return _read_annotations(read_table(path), ids, class_names)
    if suffix not in (".npz", ".npy"):
        raise InputError(
            f"{path}: expected a mask (.npz, .npy) or a table of labels ({', '.join(SUFFIXES)})."
        )
    mask = partial.load_mask(path)[0] if suffix == ".npz" else _read_npy(path)
    if mask.shape != np.shape(labels):
        raise InputError(
            f"{path}: its mask has the shape {list(mask.shape)}, the training split's labels "
            f"{list(np.shape(labels))} (images, classes). A mask for every image of a set's "
            "training split needs data.validation_fraction=0 and data.without_labels=keep."
        )
    return partial.annotate(labels, mask)


def _read_npy(path: pathlib.Path) -> np.ndarray:
    """Reads bool [N, C] from an array of booleans, or of integers 0 and 1."""
    try:
        mask = npz.parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except npz.ArrayError as error:
        raise InputError(
            f"{path} is no .npy file of numbers, or is damaged ({error}); write it by "
            "numpy.save(path, mask), mask a bool array."
        ) from None
    if mask.dtype != np.bool_ and mask.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {mask.dtype}; expected a mask of bool, or of integers 0 and 1."
        )
    wrong = np.argwhere((mask != 0) & (mask != 1))
    if len(wrong):
        first = tuple(wrong[0].tolist())
        raise InputError(
            f"{path}: {len(wrong):,} entries are neither 0 nor 1; the first, at {list(first)}, is "
            f"{mask[first]}. A mask says which labels are known (1) and which are not (0); labels "
            "of your own go into a table."
        )
    return mask.astype(bool)


def _read_annotations(table: Table, ids: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Reads annotations int8 [N, C] from a table."""
    id_column = _id_column(table, class_names)
    faults: list[str] = []
    columns = _class_columns(table, id_column, class_names, faults)
    annotations = np.full((len(ids), len(class_names)), partial.UNKNOWN, np.int8)
    place = {name: row for row, name in enumerate(ids)}
    first: dict[str, int] = {}
    for number, cells in enumerate(table.rows, start=table.first_row):
        name = cells[id_column].replace("\\", "/")
        where = f"row {number}, column {table.columns[id_column]!r}: {cells[id_column]!r}"
        if not name:
            faults.append(f"{where}; expected the name of an image")
        elif name in first:
            faults.append(f"{where}; row {first[name]} has the same image; expected one row each")
        first.setdefault(name, number)
        found = annotations[place[name]] if name in place else np.empty(len(class_names), np.int8)
        for column, label in columns.items():
            meaning = CELLS.get(plain(cells[column]))
            if meaning is None:
                cell = f"column {table.columns[column]!r}: {cells[column]!r}"
                faults.append(f"row {number}, {cell}; {_EXPECTED}")
            else:
                found[label] = meaning
    if faults:
        raise unusable(table, len(faults), "thing", first_faults(faults))
    if place.keys().isdisjoint(first):
        raise InputError(
            f"{table.path}: none of its {len(first):,} images, such as {next(iter(first))!r}, is "
            f"among the {len(ids):,} of the training split, such as {ids[0]!r}; column "
            f"{table.columns[id_column]!r} must name them as the training split does."
        )
    return annotations


def _id_column(table: Table, class_names: Sequence[str]) -> int:
    lowered = {
        name.lower(): column
        for column, name in reversed(list(enumerate(table.columns)))
        if name not in class_names
    }
    found = next((lowered[name] for name in _ID_COLUMNS if name in lowered), 0)
    if table.columns[found] in class_names:
        raise InputError(
            f"{table.path} has no column of images: its first one, {table.columns[0]!r}, is a "
            f"class, and none is called {', '.join(_ID_COLUMNS)}."
        )
    return found


def _class_columns(
    table: Table, id_column: int, class_names: Sequence[str], faults: list[str]
) -> dict[int, int]:
    """Returns {column of the table: column of the labels}; what is no class is a fault."""
    place = {name: label for label, name in enumerate(class_names)}
    passed_over = {id_column, 0} if table.has_index else {id_column}
    found = {}
    for column, name in enumerate(table.columns):
        if name in place:
            found[column] = place[name]
        elif column not in passed_over and name.lower() not in SPLIT_COLUMNS:
            # A file of something else may have any number of columns, and this takes its time.
            shown = len(faults) < FAULTS_SHOWN
            near = difflib.get_close_matches(name, class_names, n=3) if shown else []
            lowered = [known for known in class_names if known.lower() == name.lower()]
            near = list(dict.fromkeys([*lowered, *near]))
            hint = f"near ones: {', '.join(map(repr, near))}" if near else "and none is like it"
            faults.append(f"column {name!r} is no class of the data set; {hint}")
    if not found and not faults:
        faults.append(f"no column is a class; the first class is {class_names[0]!r}")
    return found
