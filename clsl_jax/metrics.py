"""Multi-label metrics on the host, in float64: average precision and precision, recall, F1.

Every function takes whole matrices, [N, C] with N images and C classes. An entry is left out where
`ignore` is True and where its label is -1 (nobody knows); what the score says there does not
matter, with one exception: the top-k of an image is chosen among *all* its classes, and only then
are ignored entries left out, so an ignored class with a high score uses up a place.

No result depends on the order of the images, not even in its last bit and with tied scores.
"""

from typing import NamedTuple

import numpy as np

CONVENTIONS = ("interpolated", "uninterpolated")

# Columns are taken in blocks of about this many entries, which bounds the memory for many classes.
_BLOCK_ENTRIES = 4_000_000


def average_precision(
    scores: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray | None = None,
    *,
    convention: str = "interpolated",
) -> np.ndarray:
    """Average precision of each class.

    One operating point per distinct score: tied images enter together, as in scikit-learn. With
    precision P and recall R at the points in order of falling score:

    * ``uninterpolated``: the sum of ``(R_k - R_{k-1}) P_k``; equals scikit-learn's
      ``average_precision_score``. Used by DualCoOp, SCPNet.
    * ``interpolated``: the same with P_k replaced by the largest precision at recall R_k or more,
      that is the area under the curve made monotone from the right (PASCAL VOC 2010 and later, not
      the 11-point average of VOC 2007). Used by CLSL and the SST family.

    Args:
        scores: [N, C], larger is more positive; any monotone scale. Finite where counted.
        labels: [N, C], 1 positive, 0 negative, -1 left out.
        ignore: [N, C] bool, True left out; None ignores nothing.
        convention: ``interpolated`` or ``uninterpolated``.

    Returns:
        [C] float64 in [0, 1]; nan for a class without a positive among the counted images.

    Raises:
        ValueError: shapes differ, a label is none of 1, 0, -1, a counted score is not finite, or
            the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"AP convention {convention!r} is unknown: use {' or '.join(CONVENTIONS)}")
    scores, positive, counted = _checked(scores, labels, ignore)
    n, c = scores.shape
    result = np.full(c, np.nan)
    if n == 0:
        return result
    width = max(1, _BLOCK_ENTRIES // n)
    for start in range(0, c, width):
        block = slice(start, start + width)
        result[block] = _average_precision_block(
            scores[:, block], positive[:, block], counted[:, block], convention == "interpolated"
        )
    return result


def mean_average_precision(
    scores: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray | None = None,
    *,
    convention: str = "interpolated",
) -> float:
    """Mean of `average_precision` over the classes that have a positive, in [0, 1].

    Classes without one have no AP and are left out of the mean; nan when there is no class left.
    """
    return mean_of_defined(average_precision(scores, labels, ignore, convention=convention))


def mean_of_defined(ap: np.ndarray) -> float:
    """Mean of the entries of float [C] that are not nan; nan when there is none."""
    defined = ~np.isnan(ap)
    return float(ap[defined].mean()) if defined.any() else float("nan")


class ClassificationCounts(NamedTuple):
    """Per-class counts behind precision and recall, each [C] int64; they add up over images.

    Attributes:
        correct: counted entries that are predicted and positive.
        predicted: counted entries that are predicted.
        positive: counted entries that are positive.
    """

    correct: np.ndarray
    predicted: np.ndarray
    positive: np.ndarray


def classification_counts(
    scores: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray | None = None,
    *,
    threshold: float | None = 0.5,
    top_k: int | None = None,
) -> ClassificationCounts:
    """Counts the predictions of each class.

    A class is predicted where ``score > threshold`` and, with `top_k`, where its score is among the
    k largest of all classes of the image; equal scores go to the lower class index first.

    Args:
        scores: [N, C] on the scale of `threshold`, finite where counted.
        labels: [N, C], 1 positive, 0 negative, -1 left out.
        ignore: [N, C] bool, True left out.
        threshold: scores must exceed it; None sets no threshold.
        top_k: at most so many predictions per image; None sets no limit. More than C is no limit.

    Returns:
        Sums over the images.

    Raises:
        ValueError: neither `threshold` nor `top_k` is given, `top_k` < 1, or as
            `average_precision`.
    """
    if threshold is None and top_k is None:
        raise ValueError("classification_counts: give threshold, top_k or both")
    if top_k is not None and top_k < 1:
        raise ValueError(f"classification_counts: top_k must be at least 1, found {top_k}")
    scores, positive, counted = _checked(scores, labels, ignore)
    predicted = counted.copy()
    if threshold is not None:
        predicted &= scores > threshold
    if top_k is not None:
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        among = np.zeros_like(predicted)
        np.put_along_axis(among, chosen, True, axis=1)
        predicted &= among
    return ClassificationCounts(
        correct=(predicted & positive).sum(axis=0),
        predicted=predicted.sum(axis=0),
        positive=positive.sum(axis=0),
    )


def precision_recall_f1(counts: ClassificationCounts) -> dict[str, float]:
    """Averages counts into CP, CR, CF1 (over classes) and OP, OR, OF1 (over all entries).

    CP and CR are means of the classes' precisions and recalls over *all* C classes, where a class
    without a prediction has precision 0 and one without a positive has recall 0 (scikit-learn's
    ``zero_division=0``). CF1 is the harmonic mean of CP and CR, not the mean of F1 scores; OF1 that
    of OP and OR. A harmonic mean of zeros is 0.

    Args:
        counts: of the whole data set.

    Returns:
        CP, CR, CF1, OP, OR, OF1, each in [0, 1].
    """
    correct, predicted, positive = (np.asarray(field, np.float64) for field in counts)
    result = {}
    for letter, precision, recall in (
        ("C", _ratio(correct, predicted).mean(), _ratio(correct, positive).mean()),
        ("O", _ratio(correct.sum(), predicted.sum()), _ratio(correct.sum(), positive.sum())),
    ):
        result[f"{letter}P"] = float(precision)
        result[f"{letter}R"] = float(recall)
        result[f"{letter}F1"] = float(_ratio(2 * precision * recall, precision + recall))
    return result


def classification_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray | None = None,
    *,
    threshold: float | None = 0.5,
    top_k: int | None = None,
) -> dict[str, float]:
    """CP, CR, CF1, OP, OR, OF1 by a threshold, by the top k of each image, or by both.

    The top-3 figures of the field (CNN-RNN, ML-GCN, CLSL) are ``top_k=3`` *with* the threshold 0.5:
    a top class must also exceed it. ``top_k=3, threshold=None`` predicts exactly three.

    Args, Returns, Raises: as `classification_counts` and `precision_recall_f1`.
    """
    return precision_recall_f1(
        classification_counts(scores, labels, ignore, threshold=threshold, top_k=top_k)
    )


def _average_precision_block(
    scores: np.ndarray, positive: np.ndarray, counted: np.ndarray, interpolated: bool
) -> np.ndarray:
    key = np.where(counted, -scores, np.inf)  # entries left out sort behind every counted one
    order = np.argsort(key, axis=0, kind="stable")
    key = np.take_along_axis(key, order, axis=0)
    hits = np.cumsum(np.take_along_axis(positive, order, axis=0), axis=0)
    seen = np.cumsum(np.take_along_axis(counted, order, axis=0), axis=0)

    is_point = np.ones(key.shape, bool)  # the last image of each run of tied scores
    is_point[:-1] = key[1:] != key[:-1]
    precision = np.where(is_point, hits / np.maximum(seen, 1), 0.0)
    if interpolated:
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    hits_before = np.zeros_like(hits)  # at the point before
    hits_before[1:] = np.maximum.accumulate(np.where(is_point, hits, 0), axis=0)[:-1]
    gained = np.where(is_point, hits - hits_before, 0)
    area, total = (gained * precision).sum(axis=0), hits[-1]
    return np.where(total > 0, area / np.maximum(total, 1), np.nan)


def _checked(
    scores: np.ndarray, labels: np.ndarray, ignore: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores in float64, where entries are counted and positive, and where they are counted."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(
            f"scores and labels must both be [N, C], found {scores.shape} and {labels.shape}"
        )
    allowed = (labels == 1) | (labels == 0) | (labels == -1)
    if not allowed.all():
        row, column = np.argwhere(~allowed)[0]
        raise ValueError(
            f"label of row {row}, class {column} is {labels[row, column]}: "
            "allowed are 1 (positive), 0 (negative) and -1 (left out)"
        )
    counted = labels != -1
    if ignore is not None:
        ignore = np.asarray(ignore)
        if ignore.shape != scores.shape:
            raise ValueError(f"ignore must be {scores.shape} like scores, found {ignore.shape}")
        counted &= ignore == 0
    bad = counted & ~np.isfinite(scores)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"score of row {row}, class {column} is {scores[row, column]}: the model has diverged, "
            "or the scores are not those of this model; scores must be finite"
        )
    return scores, (labels == 1) & counted, counted


def _ratio(top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray:
    """top / bottom, and 0 where bottom is 0."""
    bottom = np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros(bottom.shape), where=bottom > 0)
