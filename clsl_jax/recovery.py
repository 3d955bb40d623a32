"""Recovery of unknown labels from the scores of a model in training.

Two ways, both pure functions of arrays:

* `online_targets` works within a batch, as the CLSL authors' program does.
* Per epoch: `scatter_scores` averages the model's scores into a matrix with one row per training
  image, and at the end of an epoch `adaptive_thresholds`, `expected_thresholds` or
  `matched_thresholds` and `recover_labels` turn the whole matrix into labels, `recovery_counts` and
  `recovery_summary` into figures for people.

Every [N, C] array may be sharded by row over any mesh: `scatter_scores` gathers the batch, the
others need no collective but sums of per-class integers, so sharding does not change a bit of their
results. Known entries are never changed by any of them.

Letters: N training images (padded rows: no visit, every annotation unknown), B batch, C classes.
Annotations are 1 positive, 0 negative, -1 unknown.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ABOVE_EVERY_SCORE = 2.0
BELOW_EVERY_SCORE = -1.0


def scatter_scores(
    scores: jax.Array,
    visits: jax.Array,
    rows: jax.Array,
    new: jax.Array,
    momentum: jax.Array | float,
    *,
    distinct: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Averages a batch of scores into its rows, exponentially over the visits of each row.

    The average is bias-corrected: on visit n (from 1) the new value has weight
    ``(1 - momentum) / (1 - momentum^n)``, so the first visit takes the value as it is and the n-th
    average weighs visit i by ``momentum^(n-i)``, normalised. Rows of N or more, and negative ones,
    are padding and are dropped. Of a row that occurs twice in a batch the first example counts.

    Args:
        scores: [N, C] float32, probabilities averaged so far.
        visits: [N] int32, visits of each row so far.
        rows: [B] integer, row of each example.
        new: [B, C], probabilities of this batch.
        momentum: in [0, 1); 0 keeps the last value only.
        distinct: that no row but padding occurs twice, which is then not looked for.

    Returns:
        The new scores [N, C] and visits [N].
    """
    rows = jnp.where(rows < 0, visits.shape[0], rows)  # a negative index would wrap around
    if not distinct:
        # Which of two equal indices a scatter takes is left open, and differs between devices.
        first = jnp.argmax(rows[:, None] == rows[None, :], axis=1) == jnp.arange(rows.shape[0])
        rows = jnp.where(first, rows, visits.shape[0])
    before = visits.at[rows].get(mode="fill", fill_value=0)
    old = scores.at[rows].get(mode="fill", fill_value=0)
    momentum = jnp.asarray(momentum, scores.dtype)
    blend = (1.0 - momentum) / (1.0 - momentum ** (before + 1).astype(scores.dtype))
    blend = blend[:, None]
    new = new.astype(scores.dtype)
    average = jnp.where((before == 0)[:, None], new, (1.0 - blend) * old + blend * new)
    scores = scores.at[rows].set(average, mode="drop")
    visits = visits.at[rows].set(before + 1, mode="drop")
    return scores, visits


def online_targets(
    semantic_logits: jax.Array,
    annotations: jax.Array,
    *,
    sharpening: str = "safe",
    log_odds: Callable[[jax.Array], jax.Array] = lambda logits: logits,
) -> jax.Array:
    """Targets of the global branch from the semantic branch of the same batch.

    ``released`` sharpens by the image's largest logit, ``sigmoid(z1 * max_c z1)``; where that is
    negative the sign of every logit flips, and unknown labels come out near 1. ``safe`` never
    flips: ``sigmoid(z1 * max(1, |max_c z1|))``.

    Args:
        semantic_logits: [B, C], z1.
        annotations: [B, C], 1 positive, 0 negative, -1 unknown.
        sharpening: ``safe`` or ``released``.
        log_odds: what logits stand for where the loss takes a target for how often a label is
            positive (`losses.expected_loss`): of z1 before it is sharpened safely, of what the
            released formula makes of z1, so that its sign flips where the program's does.

    Returns:
        [B, C] float32 in [0, 1], without gradient: the label where known.

    Raises:
        ValueError: `sharpening` is neither of the two.

    Source: CLSL, arXiv 2510.10055, label recovery; the released program where named so.
    """
    logits = jax.lax.stop_gradient(semantic_logits).astype(jnp.float32)
    if sharpening == "safe":
        logits = log_odds(logits)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        sharpened = logits * jnp.maximum(1.0, jnp.abs(largest))
    elif sharpening == "released":
        sharpened = log_odds(logits * jnp.max(logits, axis=-1, keepdims=True))
    else:
        raise ValueError(f"sharpening {sharpening!r} is unknown: use 'safe' or 'released'")
    return jnp.where(annotations >= 0, annotations.astype(jnp.float32), jax.nn.sigmoid(sharpened))


def adaptive_thresholds(
    scores: jax.Array,
    annotations: jax.Array,
    visits: jax.Array,
    *,
    positive_precision: jax.Array | float,
    negative_precision: jax.Array | float,
    min_count: jax.Array | int = 1,
    min_known: jax.Array | int = 1,
    bins: int = 1024,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Thresholds per class, calibrated on the known entries of visited rows.

    Candidates are the edges ``k / bins``, k = 0 ... bins. The positive threshold is the lowest edge
    t for which, among the known entries with ``score >= t``, the share of positives is at least
    `positive_precision`; the negative one is the highest edge t for which, among those with
    ``score < t``, the share of negatives is at least `negative_precision`. A side counts at least
    `min_count` known entries, or recovers nothing. Neither does a class with fewer than `min_known`
    known positives or known negatives: these are the counterexamples of the other side, without
    which every precision would be 1, and a few say little, as the network was trained on them.

    Scores are counted into a histogram, class by class: no sort, and nothing larger than a column
    is kept.

    Args:
        scores: [N, C] float32, clipped to [0, 1] for counting.
        annotations: [N, C], 1 positive, 0 negative, -1 unknown.
        visits: [N] integer, 0 where the row has no score yet.
        positive_precision: target, scalar or [C], may be traced.
        negative_precision: target, scalar or [C], may be traced.
        min_count: known entries that a threshold must rest on, >= 1, may be traced.
        min_known: known positives, and known negatives, that a class needs, >= 1, may be traced.
        bins: resolution, a power of two, so that the edges are exact in float32.
        axis_name: inside `jax.shard_map`: the mesh axis over which the rows are spread.

    Returns:
        positive [C] and negative [C] float32: thresholds for `recover_labels`; above every score
        and below every score where a side recovers nothing.

    Raises:
        ValueError: `bins` is no power of two.
    """
    counts = _histogram(scores, annotations, visits, bins)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    return _thresholds(
        counts[:, 1],
        counts[:, 0] + counts[:, 1],
        counts.sum(2),
        positive_precision=positive_precision,
        negative_precision=negative_precision,
        min_count=min_count,
        min_known=jnp.maximum(min_known, 1),
    )


def expected_thresholds(
    scores: jax.Array,
    annotations: jax.Array,
    visits: jax.Array,
    *,
    positive_precision: jax.Array | float,
    negative_precision: jax.Array | float,
    min_count: jax.Array | int = 1,
    min_known: jax.Array | int = 1,
    bins: int = 1024,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Thresholds per class whose *expected* precision, by the scores themselves, is a target.

    As `adaptive_thresholds`, but the precision is that of the unknown entries in question: the mean
    of their scores where ``score >= t``, and of 1 minus their scores where ``score < t``. The known
    entries flatter a network that was trained on them; its probabilities for the unknown ones,
    where these are calibrated, do not. A score counts as the middle of its bin, 1 as 1. A class
    with fewer than `min_known` known positives or negatives recovers nothing: what its scores mean,
    too few entries have said.

    Args:
        scores: [N, C] float32, calibrated probabilities, clipped to [0, 1] for counting.
        annotations: [N, C], 1 positive, 0 negative, -1 unknown.
        visits: [N] integer, 0 where the row has no score yet.
        positive_precision: target, scalar or [C], may be traced.
        negative_precision: target, scalar or [C], may be traced.
        min_count: unknown entries that a threshold must rest on, >= 1, may be traced.
        min_known: as in `adaptive_thresholds`, but may be 0.
        bins: resolution, a power of two, so that the edges are exact in float32.
        axis_name: inside `jax.shard_map`: the mesh axis over which the rows are spread.

    Returns:
        As `adaptive_thresholds`.

    Raises:
        ValueError: `bins` is no power of two.
    """
    counts = _histogram(scores, annotations, visits, bins, unknown=True)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    middle = jnp.minimum((jnp.arange(bins + 1, dtype=jnp.float32) + 0.5) / bins, 1.0)
    return _thresholds(
        counts[:, 2] * middle,
        counts[:, 2],
        counts[:, :2].sum(2),
        positive_precision=positive_precision,
        negative_precision=negative_precision,
        min_count=min_count,
        min_known=min_known,
    )


def matched_thresholds(
    scores: jax.Array,
    annotations: jax.Array,
    visits: jax.Array,
    *,
    positive_coverage: jax.Array | float,
    negative_coverage: jax.Array | float,
    min_known: jax.Array | int = 1,
    bins: int = 1024,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Thresholds per class that recover positives and negatives as often as the class is known to
    have them.

    Of the n unknown entries of visited rows ``positive_coverage * frequency * n`` at most are
    recovered as positive, those of the highest scores, and ``negative_coverage * (1 - frequency) *
    n`` at most as negative, those of the lowest, where `frequency` is the share of positives among
    the known entries of visited rows. Thresholds are edges ``k / bins``, so that entries of one bin
    are taken together or not at all: where more scores than are due lie below ``1 / bins``, no
    negative is recovered. What is known has to be known at random for its frequency to be that of
    the others.

    Args:
        scores: [N, C] float32, clipped to [0, 1] for counting; their order alone counts.
        annotations: [N, C], 1 positive, 0 negative, -1 unknown.
        visits: [N] integer, 0 where the row has no score yet.
        positive_coverage: share of the expected positives to recover, scalar or [C] in [0, 1], may
            be traced.
        negative_coverage: share of the expected negatives.
        min_known: as in `adaptive_thresholds`.
        bins: resolution, a power of two, so that the edges are exact in float32.
        axis_name: inside `jax.shard_map`: the mesh axis over which the rows are spread.

    Returns:
        positive [C] and negative [C] float32: thresholds for `recover_labels`; above every score
        and below every score in a class with too few known entries.

    Raises:
        ValueError: `bins` is no power of two.

    Source: class-distribution-aware thresholds, Xie et al., CAP, arXiv 2305.02795.
    """
    counts = _histogram(scores, annotations, visits, bins, unknown=True)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    known = counts[:, :2].sum(2)
    enough = _enough(known, jnp.maximum(min_known, 1))
    above = _sums_from(counts[:, 2])
    unknown = above[:, :1]
    # A product first: a share rounded down would miss a count that is due.
    negatives_due, positives_due = (
        jnp.asarray(coverage, jnp.float32)[..., None]
        * unknown
        * known[:, kind, None]
        / jnp.maximum(known.sum(1, keepdims=True), 1)
        for kind, coverage in enumerate((negative_coverage, positive_coverage))
    )
    return _outermost_edges(
        enough & (above <= positives_due), enough & (unknown - above <= negatives_due)
    )


def _thresholds(
    positives: jax.Array,
    entries: jax.Array,
    known: jax.Array,
    *,
    positive_precision: jax.Array | float,
    negative_precision: jax.Array | float,
    min_count: jax.Array | int,
    min_known: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest edge beyond which a precision is reached, class by class.

    Args:
        positives: [C, bins + 1] of each bin, or how many are expected there.
        entries: [C, bins + 1] integer, positive or not.
        known: [C, 2] known negatives and known positives.
        positive_precision, negative_precision, min_count, min_known: as in `adaptive_thresholds`.
    """
    positives_above, entries_above = (_sums_from(x) for x in (positives, entries))
    # Sums of their own: the few negatives below would be lost in a difference of large sums.
    negatives_below, entries_below = (_sums_below(x) for x in (entries - positives, entries))
    enough = _enough(known, min_known)

    meets_positive = enough & _meets(positives_above, entries_above, positive_precision, min_count)
    meets_negative = enough & _meets(negatives_below, entries_below, negative_precision, min_count)
    return _outermost_edges(meets_positive, meets_negative)


def _outermost_edges(positive: jax.Array, negative: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest edge of each class that is a threshold of positives, the highest of negatives.

    Args:
        positive, negative: bool [C, bins + 1].

    Returns:
        Two float32 [C]; where no edge is one, `ABOVE_EVERY_SCORE` and `BELOW_EVERY_SCORE`.
    """
    bins = positive.shape[1] - 1
    edges = jnp.arange(bins + 1, dtype=jnp.float32) / bins
    lowest = jnp.min(jnp.where(positive, edges, ABOVE_EVERY_SCORE), axis=1)
    highest = jnp.max(jnp.where(negative, edges, BELOW_EVERY_SCORE), axis=1)
    return lowest, highest


def recover_labels(
    scores: jax.Array,
    visits: jax.Array,
    annotations: jax.Array,
    *,
    positive_threshold: jax.Array | float,
    negative_threshold: jax.Array | float,
    soft: bool = True,
    confidence_power: jax.Array | float = 0.0,
    active: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Labels of every training image: known ones as they are, unknown ones recovered or left open.

    An unknown entry of a visited row is recovered as positive where ``score >= positive_threshold``
    and as negative where ``score < negative_threshold``; one that satisfies both contradicts itself
    and stays open. With both thresholds 0, every unknown entry is recovered (useful with `soft`).

    Args:
        scores: [N, C] float32, probabilities. A score that is not finite recovers nothing.
        visits: [N] integer, 0 where the row has no score yet.
        annotations: [N, C], 1 positive, 0 negative, -1 unknown.
        positive_threshold: scalar or [C], may be traced.
        negative_threshold: scalar or [C], may be traced.
        soft: recovered labels are the scores themselves with weight ``|2 score - 1|^power``, else 1
            and 0 with weight 1. A soft label takes its side from the score, not from the threshold
            that it passed.
        confidence_power: the power above, >= 0, may be traced; 0 makes every weight 1.
        active: False recovers nothing (warm-up), may be traced.

    Returns:
        recovered: [N, C] float32 in [0, 1]; exactly the annotation where known, 0 where left open.
        weight: [N, C] float32 in [0, 1]; 0 where known (the known term of the loss has those) and
            where left open.
    """
    known = annotations >= 0
    score = jnp.clip(scores.astype(jnp.float32), 0.0, 1.0)
    above = score >= positive_threshold
    below = score < negative_threshold
    visited = (visits > 0)[:, None]
    open_to_recovery = ~known & visited & jnp.isfinite(scores) & jnp.asarray(active, bool)
    taken = open_to_recovery & (above ^ below)
    if soft:
        label = score
        confidence = jnp.power(jnp.abs(2.0 * score - 1.0), confidence_power)
    else:
        label = above.astype(jnp.float32)
        confidence = jnp.ones_like(score)
    recovered = jnp.where(known, annotations.astype(jnp.float32), jnp.where(taken, label, 0.0))
    return recovered, jnp.where(taken, confidence, 0.0)


class RecoveryCounts(NamedTuple):
    """Per-class counts of recovery against the full labels, each [C] int32.

    An entry is hidden where its annotation is unknown and its full label is not. Counts add up over
    disjoint sets of rows.

    Attributes:
        hidden_positives: hidden entries whose label is positive.
        hidden_negatives: hidden entries whose label is negative.
        recovered_positives: hidden entries recovered as positive.
        recovered_negatives: hidden entries recovered as negative.
        correct_positives: recovered positives whose label is positive.
        correct_negatives: recovered negatives whose label is negative.
    """

    hidden_positives: jax.Array
    hidden_negatives: jax.Array
    recovered_positives: jax.Array
    recovered_negatives: jax.Array
    correct_positives: jax.Array
    correct_negatives: jax.Array


def recovery_counts(
    recovered: jax.Array, weight: jax.Array, annotations: jax.Array, labels: jax.Array
) -> RecoveryCounts:
    """Counts how recovered labels fare against the hidden ones; a diagnostic, never a training
    signal.

    Args:
        recovered: [N, C] in [0, 1], from `recover_labels`; positive from 0.5 on.
        weight: [N, C]; an entry counts as recovered where it is > 0.
        annotations: [N, C], 1 positive, 0 negative, -1 unknown.
        labels: [N, C], full labels; -1 where nobody knows, which is counted nowhere.

    Returns:
        Sums over the rows.
    """
    hidden = (annotations < 0) & (labels >= 0)
    taken = hidden & (weight > 0)
    as_positive = taken & (recovered >= 0.5)
    as_negative = taken & (recovered < 0.5)
    positive, negative = labels == 1, labels == 0

    def count(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask, axis=0, dtype=jnp.int32)

    return RecoveryCounts(
        hidden_positives=count(hidden & positive),
        hidden_negatives=count(hidden & negative),
        recovered_positives=count(as_positive),
        recovered_negatives=count(as_negative),
        correct_positives=count(as_positive & positive),
        correct_negatives=count(as_negative & negative),
    )


def recovered_numbers(recovered: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many labels of each class were recovered as positive and as negative, right or not.

    Args:
        recovered: [N, C] in [0, 1], from `recover_labels`; positive from 0.5 on.
        weight: [N, C]; an entry counts as recovered where it is > 0.

    Returns:
        int32 [C] each: their sums over many classes may be too large for one.
    """
    taken = weight > 0
    positive = jnp.sum(taken & (recovered >= 0.5), axis=0, dtype=jnp.int32)
    return positive, jnp.sum(taken, axis=0, dtype=jnp.int32) - positive


def recovery_summary(counts: RecoveryCounts) -> dict[str, dict[str, float | np.ndarray]]:
    """Precision, recall and coverage of recovery, on the host.

    Precision is the share of recovered labels that are right, recall the share of hidden labels of
    a kind that were recovered rightly, coverage the share of hidden entries that were recovered
    either way. A figure without a denominator is nan.

    Args:
        counts: of the whole training set, on the host or fully addressable.

    Returns:
        ``overall`` (floats, from the counts summed over the classes) and ``per_class`` ([C]
        float64), each with ``positive_precision``, ``positive_recall``, ``negative_precision``,
        ``negative_recall`` and ``coverage``.
    """
    per_class = RecoveryCounts(*(np.asarray(field, np.float64) for field in counts))
    overall = RecoveryCounts(*(field.sum() for field in per_class))
    return {
        "overall": {name: float(value) for name, value in _rates(overall).items()},
        "per_class": _rates(per_class),
    }


def _rates(counts: RecoveryCounts) -> dict[str, np.ndarray]:
    recovered = counts.recovered_positives + counts.recovered_negatives
    hidden = counts.hidden_positives + counts.hidden_negatives
    fractions = {
        "positive_precision": (counts.correct_positives, counts.recovered_positives),
        "positive_recall": (counts.correct_positives, counts.hidden_positives),
        "negative_precision": (counts.correct_negatives, counts.recovered_negatives),
        "negative_recall": (counts.correct_negatives, counts.hidden_negatives),
        "coverage": (recovered, hidden),
    }
    with np.errstate(invalid="ignore"):
        return {name: top / bottom for name, (top, bottom) in fractions.items()}


def _enough(known: jax.Array, min_known: jax.Array | int) -> jax.Array:
    """Which classes [C, 1] have so many known negatives and so many known positives, [C, 2]."""
    return jnp.min(known, axis=1, keepdims=True) >= min_known


def _sums_from(bins: jax.Array) -> jax.Array:
    """What each bin [C, bins] and those above it hold together."""
    return jnp.cumsum(bins[:, ::-1], axis=1)[:, ::-1]


def _sums_below(bins: jax.Array) -> jax.Array:
    """What the bins below each bin of [C, bins] hold together."""
    return jnp.pad(jnp.cumsum(bins[:, :-1], axis=1), ((0, 0), (1, 0)))


def _meets(
    right: jax.Array, total: jax.Array, precision: jax.Array | float, min_count: jax.Array | int
) -> jax.Array:
    """Where [C, edges] counts reach a precision (scalar or [C]) and a number of entries."""
    precision = jnp.asarray(precision, jnp.float32)[..., None]
    reached = right.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32) >= precision
    return reached & (total >= jnp.maximum(min_count, 1))


def _histogram(
    scores: jax.Array, annotations: jax.Array, visits: jax.Array, bins: int, unknown: bool = False
) -> jax.Array:
    """Entries of visited rows by class, annotation and bin: [C, 2 or 3, bins + 1] int32.

    Annotations in the order 0, 1 and, where asked for, unknown. Bin k < bins holds
    k / bins <= score < (k + 1) / bins, the last one the scores of 1.

    Raises:
        ValueError: `bins` is no power of two.
    """
    if bins < 1 or bins & (bins - 1):
        raise ValueError(f"the bins of thresholds must be a power of two, found {bins}")
    visited = visits > 0
    kinds = 3 if unknown else 2

    def one_class(index: jax.Array) -> jax.Array:
        score = jax.lax.dynamic_index_in_dim(scores, index, axis=1, keepdims=False)
        annotation = jax.lax.dynamic_index_in_dim(annotations, index, axis=1, keepdims=False)
        kind = jnp.where(annotation < 0, 2, annotation).astype(jnp.int32)
        counted = (kind < kinds) & visited & jnp.isfinite(score)
        cell = jnp.floor(jnp.clip(score.astype(jnp.float32), 0.0, 1.0) * bins).astype(jnp.int32)
        cell += (bins + 1) * kind
        zeros = jnp.zeros(kinds * (bins + 1), jnp.int32)
        return zeros.at[jnp.where(counted, cell, zeros.size)].add(1, mode="drop")

    # A loop over classes bounds the memory: indices of [N], never of [N, C].
    counts = jax.lax.map(one_class, jnp.arange(scores.shape[1]))
    return counts.reshape(-1, kinds, bins + 1)
