"""Metrics against hand arithmetic, scikit-learn, a brute-force oracle and the parity fixtures."""

import json
import os
import pathlib

import hypothesis
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clsl_jax import metrics
from clsl_jax.metrics import (
    ClassificationCounts,
    average_precision,
    classification_counts,
    classification_metrics,
    mean_average_precision,
    precision_recall_f1,
)

PARITY = pathlib.Path(
    os.environ.get("CLSL_PARITY_DIR", pathlib.Path(__file__).parent / "parity")
).expanduser()
NAMES = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def fixtures(kind):
    found = []
    for path in sorted(PARITY.glob("*.npz")):
        with np.load(path) as data:
            if json.loads(str(data["config"]))["kind"] == kind:
                found.append(pytest.param(path, id=path.stem))
    return found


@pytest.mark.parametrize("path", fixtures("metrics"))
@pytest.mark.parametrize("prefix", ["all", "ignore"])
def test_metrics_equal_the_released_program(path, prefix):
    data = np.load(path)
    config = json.loads(str(data["config"]))
    ignore = data["ignore"] if prefix == "ignore" else None
    case = (data["scores"], data["labels"], ignore)
    np.testing.assert_allclose(average_precision(*case), data[f"{prefix}_ap"], rtol=0, atol=1e-9)
    assert mean_average_precision(*case) == pytest.approx(float(data[f"{prefix}_map"]), abs=1e-9)
    for name, top_k in (("threshold", None), ("top3", config["top_k"])):
        found = classification_metrics(*case, threshold=config["threshold"], top_k=top_k)
        expected = data[f"{prefix}_{name}"]
        np.testing.assert_allclose([found[n] for n in NAMES], expected, rtol=0, atol=1e-9)


def test_average_precision_by_hand():
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    labels = np.array([[1], [0], [0], [1], [1]])
    # Precision at the positives: 1, 2/4, 3/5; the envelope lifts 2/4 to 3/5.
    plain = average_precision(scores, labels, convention="uninterpolated")
    lifted = average_precision(scores, labels, convention="interpolated")
    np.testing.assert_allclose(plain, [(1 + 0.5 + 0.6) / 3], rtol=1e-15)
    np.testing.assert_allclose(lifted, [(1 + 0.6 + 0.6) / 3], rtol=1e-15)


def test_tied_scores_are_one_operating_point():
    scores = np.array([[0.9], [0.5], [0.5], [0.5], [0.1]])
    labels = np.array([[0], [1], [0], [1], [1]])
    # Points: 0 of 1, 2 of 4, 3 of 5.
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 3, 4, 1]):
        plain = average_precision(scores[order], labels[order], convention="uninterpolated")
        np.testing.assert_allclose(plain, [(2 * 0.5 + 0.6) / 3], rtol=1e-15)
        lifted = average_precision(scores[order], labels[order])
        np.testing.assert_allclose(lifted, [0.6], rtol=1e-15)


def test_a_class_without_positives_has_no_ap():
    scores = np.array([[0.9, 0.2], [0.1, 0.3]])
    labels = np.array([[1, 0], [0, 0]])
    for convention in metrics.CONVENTIONS:
        ap = average_precision(scores, labels, convention=convention)
        assert ap[0] == 1.0
        assert np.isnan(ap[1])
        assert mean_average_precision(scores, labels, convention=convention) == 1.0
        assert np.isnan(mean_average_precision(scores, np.zeros((2, 2)), convention=convention))


def test_ignored_positives_do_not_make_a_class():
    scores, labels = np.array([[0.9], [0.1]]), np.array([[1], [0]])
    assert np.isnan(average_precision(scores, labels, np.array([[True], [False]]))[0])


def test_no_images():
    empty = np.zeros((0, 3))
    assert np.isnan(average_precision(empty, empty)).all()
    assert set(classification_metrics(empty, empty).values()) == {0.0}


def brute_force_ap(scores, labels, interpolated):
    points = []
    for threshold in sorted(set(scores), reverse=True):
        predicted = scores >= threshold
        correct = (predicted & (labels == 1)).sum()
        points.append((correct / (labels == 1).sum(), correct / predicted.sum()))
    area, before = 0.0, 0.0
    for index, (recall, precision) in enumerate(points):
        if interpolated:
            precision = max(p for _, p in points[index:])
        area += (recall - before) * precision
        before = recall
    return area


@st.composite
def cases(draw):
    shape = (draw(st.integers(1, 25)), draw(st.integers(1, 5)))
    levels = draw(st.integers(1, 30))  # few levels make many ties
    scores = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, levels))) / levels
    labels = draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))
    ignore = draw(hnp.arrays(np.bool_, shape))
    return scores, labels, ignore


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(cases())
def test_average_precision_equals_oracles(case):
    scores, labels, ignore = case
    plain = average_precision(scores, labels, ignore, convention="uninterpolated")
    lifted = average_precision(scores, labels, ignore, convention="interpolated")
    for c in range(scores.shape[1]):
        counted = ~ignore[:, c] & (labels[:, c] >= 0)
        s, y = scores[counted, c], labels[counted, c]
        if not (y == 1).any():
            assert np.isnan(plain[c])
            assert np.isnan(lifted[c])
            continue
        expected = sklearn.metrics.average_precision_score(y, s)
        assert plain[c] == pytest.approx(expected, abs=1e-12)
        assert plain[c] == pytest.approx(brute_force_ap(s, y, False), abs=1e-12)
        assert lifted[c] == pytest.approx(brute_force_ap(s, y, True), abs=1e-12)
        assert lifted[c] >= plain[c] - 1e-12


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(cases(), st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_or_on_what_is_ignored(case, random):
    scores, labels, ignore = case
    order = list(range(len(scores)))
    random.shuffle(order)
    left_out = ignore | (labels < 0)
    flipped = np.where(left_out, 1 - np.maximum(labels, 0), labels)
    for convention in metrics.CONVENTIONS:
        first = average_precision(scores, labels, ignore, convention=convention)
        noisy = np.where(left_out, np.nan, scores)
        second = average_precision(
            noisy[order], flipped[order], left_out[order], convention=convention
        )
        np.testing.assert_array_equal(first, second)
    first = classification_metrics(scores, labels, ignore, top_k=2)
    second = classification_metrics(scores[order], flipped[order], left_out[order], top_k=2)
    assert first == second


def test_blocks_of_columns_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    scores, labels = rng.random((50, 7)), rng.integers(0, 2, (50, 7))
    whole = average_precision(scores, labels)
    monkeypatch.setattr(metrics, "_BLOCK_ENTRIES", 100)
    np.testing.assert_allclose(average_precision(scores, labels), whole, rtol=1e-14)


def test_classification_by_hand():
    scores = np.array([[0.9, 0.6, 0.1], [0.7, 0.2, 0.5], [0.4, 0.8, 0.3]])
    labels = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0]])
    # Above 0.5: (0,0) (0,1) (1,0) (2,1); 0.5 itself is not.
    found = classification_metrics(scores, labels)
    assert found["CP"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found["CR"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    cp, cr = 1 / 3, 1 / 2
    assert found["CF1"] == pytest.approx(2 * cp * cr / (cp + cr))
    assert found["OP"] == pytest.approx(2 / 4)
    assert found["OR"] == pytest.approx(2 / 4)
    assert found["OF1"] == pytest.approx(1 / 2)
    # The largest of each image: (0,0) (1,0) (2,1).
    top = classification_counts(scores, labels, top_k=1)
    np.testing.assert_array_equal(top.correct, [1, 1, 0])
    np.testing.assert_array_equal(top.predicted, [2, 1, 0])
    np.testing.assert_array_equal(top.positive, [2, 1, 1])


def test_top_k_needs_the_threshold_unless_told_otherwise():
    scores, labels = np.array([[0.4, 0.9, 0.3, 0.1]]), np.array([[1, 1, 0, 0]])
    np.testing.assert_array_equal(
        classification_counts(scores, labels, top_k=3).predicted, [0, 1, 0, 0]
    )
    np.testing.assert_array_equal(
        classification_counts(scores, labels, top_k=3, threshold=None).predicted, [1, 1, 1, 0]
    )


def test_top_k_ties_go_to_the_lower_class():
    scores, labels = np.full((1, 4), 0.7), np.zeros((1, 4))
    np.testing.assert_array_equal(
        classification_counts(scores, labels, top_k=2).predicted, [1, 1, 0, 0]
    )


def test_an_ignored_class_uses_up_a_place():
    scores, labels = np.array([[0.9, 0.8, 0.7]]), np.array([[1, 1, 1]])
    ignore = np.array([[True, False, False]])
    counts = classification_counts(scores, labels, ignore, top_k=2)
    np.testing.assert_array_equal(counts.predicted, [0, 1, 0])
    np.testing.assert_array_equal(counts.positive, [0, 1, 1])


def test_a_top_k_beyond_the_classes_is_no_limit():
    scores, labels = np.array([[0.9, 0.8, 0.1]]), np.array([[1, 0, 1]])
    assert classification_metrics(scores, labels, top_k=9) == classification_metrics(scores, labels)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(cases(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_classification_equals_scikit_learn(case, threshold):
    scores, labels, _ = case
    labels = np.maximum(labels, 0)
    predicted = (scores > threshold).astype(int)
    found = classification_metrics(scores, labels, threshold=threshold)
    for letter, average in (("C", "macro"), ("O", "micro")):
        precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
            labels[:, 0] if labels.shape[1] == 1 else labels,
            predicted[:, 0] if labels.shape[1] == 1 else predicted,
            average="binary" if labels.shape[1] == 1 else average,
            zero_division=0,
        )
        assert found[f"{letter}P"] == pytest.approx(precision, abs=1e-12)
        assert found[f"{letter}R"] == pytest.approx(recall, abs=1e-12)
        if letter == "O":
            assert found["OF1"] == pytest.approx(f1, abs=1e-12)


def test_counts_add_up_over_images():
    rng = np.random.default_rng(3)
    scores, labels = rng.random((40, 6)), rng.integers(-1, 2, (40, 6))
    whole = classification_counts(scores, labels, top_k=3)
    parts = [
        classification_counts(scores[rows], labels[rows], top_k=3)
        for rows in (slice(0, 13), slice(13, 40))
    ]
    summed = ClassificationCounts(*(a + b for a, b in zip(*parts, strict=True)))
    assert precision_recall_f1(summed) == precision_recall_f1(whole)


def test_nothing_predicted_is_zero_not_nan():
    found = classification_metrics(np.zeros((3, 2)), np.ones((3, 2)))
    assert found == dict.fromkeys(NAMES, 0.0)


GOOD = (np.array([[0.9, 0.1]]), np.array([[1, 0]]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((GOOD[0], np.array([[1, 2]])), "row 0, class 1 is 2: allowed are 1"),
        ((np.array([[0.9, np.nan]]), GOOD[1]), "score of row 0, class 1 is nan"),
        ((np.array([[np.inf, 0.0]]), GOOD[1]), "score of row 0, class 0 is inf"),
        ((GOOD[0], np.array([1, 0])), r"both be \[N, C\], found \(1, 2\) and \(2,\)"),
        ((*GOOD, np.array([True])), r"ignore must be \(1, 2\)"),
    ],
)
@pytest.mark.parametrize("function", [average_precision, classification_metrics])
def test_bad_input_is_named(function, arguments, match):
    with pytest.raises(ValueError, match=match):
        function(*arguments)


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="'voc07' is unknown: use interpolated or uninterpolated"):
        average_precision(*GOOD, convention="voc07")
    with pytest.raises(ValueError, match="give threshold, top_k or both"):
        classification_metrics(*GOOD, threshold=None)
    with pytest.raises(ValueError, match="top_k must be at least 1, found 0"):
        classification_metrics(*GOOD, top_k=0)
