"""`recovered.csv` and `probabilities.csv`: every image's labels, as a run left them."""

from collections.abc import Sequence

import jax
import numpy as np
import pyarrow as pa
from pyarrow import csv

from clsl_jax import atomic
from clsl_jax.data.partial import UNKNOWN
from clsl_jax.recovery import recover_labels

RECOVERED_NAME = "recovered.csv"
PROBABILITIES_NAME = "probabilities.csv"
# More cells than this are no table that anybody opens (COCO 2014 has 10 million).
MOST_CELLS = 2**27

# Jitted: compiled one by one, its operations would take longer to compile than to run.
_recover = jax.jit(recover_labels, static_argnames=("soft",))


def fill_labels(
    annotations: np.ndarray,
    probabilities: np.ndarray,
    positive_threshold: np.ndarray,
    negative_threshold: np.ndarray,
    *,
    soft: bool = False,
    active: bool = True,
) -> np.ndarray:
    """Returns the labels with what thresholds say of the unknown ones.

    Args:
      annotations: int8 [N, C], 1 positive, 0 negative, -1 unknown.
      probabilities: float [N, C] in [0, 1].
      positive_threshold, negative_threshold, soft, active: as in `recovery.recover_labels`; a soft
        label becomes the likelier of the two.

    Returns:
      int8 [N, C]; -1 where a label stays unknown.
    """
    recovered, weight = _recover(
        probabilities,
        np.ones(len(probabilities), np.int32),
        annotations,
        positive_threshold=positive_threshold,
        negative_threshold=negative_threshold,
        soft=soft,
        confidence_power=0.0,
        active=active,
    )
    return recovered_labels(annotations, recovered, weight)


def recovered_labels(
    annotations: np.ndarray, recovered: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Returns int8 [N, C], -1 where still unknown, of what `recovery.recover_labels` gives."""
    found = np.where(np.asarray(weight) > 0, np.asarray(recovered) >= 0.5, UNKNOWN)
    return np.where(annotations == UNKNOWN, found, annotations).astype(np.int8)


def write_labels(
    path: str,
    labels: np.ndarray,
    *,
    ids: Sequence[str],
    splits: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Writes labels as the table that `clsl_jax.prepare --dataset=table` reads.

    Args:
      path: of the CSV: columns `image`, `split` and one a class.
      labels: int8 [N, C]: 1, 0, and -1 for an empty cell.
      ids: N names of images.
      splits: N names of splits.
      class_names: C names.

    Raises:
      OSError: the file cannot be written.
    """
    columns = [pa.array(column, mask=column == UNKNOWN) for column in labels.T]
    _write(path, columns, ids, splits, class_names)


def write_probabilities(
    path: str,
    probabilities: np.ndarray,
    *,
    ids: Sequence[str],
    splits: Sequence[str] | None,
    class_names: Sequence[str],
) -> None:
    """Writes probabilities [N, C], four digits each, NaN as an empty cell.

    The rest is as in `write_labels`; without `splits` the table has no such column.
    """
    rounded = np.round(probabilities.astype(np.float64), 4)
    columns = [pa.array(column, from_pandas=True) for column in rounded.T]
    _write(path, columns, ids, splits, class_names)


def _write(
    path: str,
    columns: Sequence[pa.Array],
    ids: Sequence[str],
    splits: Sequence[str] | None,
    class_names: Sequence[str],
) -> None:
    leading = {"image": pa.array(ids)}
    if splits is not None:
        leading["split"] = pa.array(splits)
    table = pa.table([*leading.values(), *columns], [*leading, *class_names])
    with atomic.replacing(path) as partial, open(partial, "wb") as file:
        csv.write_csv(table, file, csv.WriteOptions(quoting_style="needed"))
