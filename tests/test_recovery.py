"""Recovery against hand arithmetic, a brute-force oracle, and the property that matters most."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clsl_jax.recovery import (
    RecoveryCounts,
    adaptive_thresholds,
    expected_thresholds,
    matched_thresholds,
    online_targets,
    recover_labels,
    recovered_numbers,
    recovery_counts,
    recovery_summary,
    scatter_scores,
)

N, C = 16, 3  # one shape for the property tests: one compilation each

jit_recover = jax.jit(recover_labels, static_argnames=("soft",))
jit_thresholds = jax.jit(adaptive_thresholds, static_argnames=("bins",))
jit_matched = jax.jit(matched_thresholds, static_argnames=("bins",))
jit_expected = jax.jit(expected_thresholds, static_argnames=("bins",))
jit_scatter = jax.jit(scatter_scores)


@pytest.fixture(scope="module")
def mesh():
    assert len(jax.devices()) == 8, "tests/conftest.py makes 8 virtual devices"
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


# scatter_scores


def test_momentum_by_hand():
    scores, visits = jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)
    values = [
        np.array([[0.8, 0.2]], np.float32),
        np.array([[0.4, 0.6]], np.float32),
        np.array([[0.0, 1.0]], np.float32),
    ]
    # Momentum 1/2: weights 1; 1/3 2/3; 1/7 2/7 4/7.
    expected = [[0.8, 0.2], [1.6 / 3, 1.4 / 3], [1.6 / 7, 5.4 / 7]]
    for value, average in zip(values, expected, strict=True):
        scores, visits = jit_scatter(scores, visits, jnp.array([2]), value, 0.5)
        np.testing.assert_allclose(scores[2], average, rtol=1e-6)
    np.testing.assert_array_equal(visits, [0, 0, 3, 0])
    assert not bool(scores[jnp.array([0, 1, 3])].any())


def test_first_visit_takes_the_value_itself():
    stale = jnp.full((2, 1), jnp.nan)
    new = jnp.array([[0.1]])
    scores, visits = jit_scatter(stale, jnp.zeros(2, jnp.int32), jnp.array([1]), new, 0.9)
    assert float(scores[1, 0]) == float(new[0, 0])
    assert bool(jnp.isnan(scores[0, 0]))
    np.testing.assert_array_equal(visits, [0, 1])


def test_no_momentum_keeps_the_last_value():
    scores, visits = jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32)
    for value in (0.3, 0.9, 0.6):
        scores, visits = jit_scatter(scores, visits, jnp.array([0]), jnp.full((1, 1), value), 0.0)
        assert float(scores[0, 0]) == pytest.approx(value, rel=1e-6)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=1, max_size=12),
    st.floats(0, 0.9375, width=32),
)
def test_scores_are_the_normalised_exponential_average(values, momentum):
    scores, visits = jnp.zeros((3, 1)), jnp.zeros(3, jnp.int32)
    for value in values:
        scores, visits = jit_scatter(
            scores, visits, jnp.array([1]), jnp.full((1, 1), value, jnp.float32), momentum
        )
    weights = np.float64(momentum) ** np.arange(len(values) - 1, -1, -1)
    expected = (weights * values).sum() / weights.sum()
    assert float(scores[1, 0]) == pytest.approx(expected, abs=2e-5)
    assert int(visits[1]) == len(values)


def test_padding_rows_are_dropped():
    scores, visits = jnp.full((3, 2), 0.5), jnp.ones(3, jnp.int32)
    rows = jnp.array([3, 1, 1000, -1, -3])
    new = jnp.full((5, 2), 1.0)
    after, counts = jit_scatter(scores, visits, rows, new, 0.0)
    np.testing.assert_array_equal(after, [[0.5, 0.5], [1.0, 1.0], [0.5, 0.5]])
    np.testing.assert_array_equal(counts, [1, 2, 1])


def test_the_first_of_equal_rows_counts():
    scores, visits = jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32)
    new = jnp.array([[0.1], [0.2], [0.3], [0.4]])
    scores, visits = scatter_scores(scores, visits, jnp.array([2, 1, 2, -1]), new, 0.5)
    np.testing.assert_array_equal(scores, np.float32([[0], [0.2], [0.1], [0]]))
    np.testing.assert_array_equal(visits, [0, 1, 1, 0])


def test_scatter_of_sharded_rows_is_exact_donated_and_compiled_once(mesh):
    rng = np.random.default_rng(0)
    n, b = 64, 16
    scores, visits = np.zeros((n, C), np.float32), np.zeros(n, np.int32)
    sharded_scores, sharded_visits = put(mesh, scores, "data"), put(mesh, visits, "data")
    shardings = (sharded_scores.sharding, sharded_visits.sharding)

    sharded_step = jax.jit(
        lambda s, v, r, x: scatter_scores(s, v, r, x, 0.8),
        donate_argnums=(0, 1),
        out_shardings=shardings,
    )
    plain_step = jax.jit(lambda s, v, r, x: scatter_scores(s, v, r, x, 0.8))
    for _ in range(8):
        rows = rng.permutation(n + 4)[:b].astype(np.int32)  # some of them padding
        new = rng.random((b, C)).astype(np.float32)
        placed = put(mesh, rows, "data"), put(mesh, new, "data")
        with jax.transfer_guard("disallow"):
            sharded_scores, sharded_visits = sharded_step(sharded_scores, sharded_visits, *placed)
        scores, visits = plain_step(scores, visits, rows, new)
    np.testing.assert_array_equal(sharded_scores, scores)
    np.testing.assert_array_equal(sharded_visits, visits)
    assert sharded_scores.sharding == shardings[0]
    assert sharded_step._cache_size() == 1


# online_targets


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_online_targets_by_hand():
    logits = jnp.array([[2.0, -1.0, 0.5], [-3.0, -2.0, -4.0], [0.5, 0.25, -1.0]])
    annotations = jnp.array([[-1, -1, 1], [-1, 0, -1], [-1, -1, -1]], jnp.int8)
    released = online_targets(logits, annotations, sharpening="released")
    np.testing.assert_allclose(
        released,
        [
            [sigmoid(4), sigmoid(-2), 1],
            [sigmoid(6), 0, sigmoid(8)],  # every logit negative: the sign flips
            [sigmoid(0.25), sigmoid(0.125), sigmoid(-0.5)],
        ],
        rtol=1e-6,
    )
    safe = online_targets(logits, annotations, sharpening="safe")
    np.testing.assert_allclose(
        safe,
        [
            [sigmoid(4), sigmoid(-2), 1],
            [sigmoid(-6), 0, sigmoid(-8)],
            [sigmoid(0.5), sigmoid(0.25), sigmoid(-1)],
        ],
        rtol=1e-6,
    )


def test_the_released_formula_flips_where_the_logits_do_and_not_what_they_stand_for():
    logits = jnp.array([[0.5, -1.0], [-0.5, -1.0]])
    unknown = jnp.full((2, 2), -1, jnp.int8)
    released, safe = (
        online_targets(logits, unknown, sharpening=name, log_odds=lambda x: x - 2)
        for name in ("released", "safe")
    )
    np.testing.assert_allclose(
        released, [[sigmoid(-1.75), sigmoid(-2.5)], [sigmoid(-1.75), sigmoid(-1.5)]], rtol=1e-6
    )
    # The largest log odds are -1.5 and -2.5.
    np.testing.assert_allclose(
        safe, [[sigmoid(-2.25), sigmoid(-4.5)], [sigmoid(-6.25), sigmoid(-7.5)]], rtol=1e-6
    )


@pytest.mark.parametrize("sharpening", ["safe", "released"])
def test_online_targets_have_no_gradient_and_stay_in_range(sharpening):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(1e3 * rng.standard_normal((6, 5)), jnp.bfloat16)
    annotations = jnp.asarray(rng.integers(-1, 2, (6, 5)), jnp.int8)
    targets, pullback = jax.vjp(
        lambda x: online_targets(x, annotations, sharpening=sharpening), logits
    )
    assert targets.dtype == jnp.float32
    assert bool(((targets >= 0) & (targets <= 1)).all())
    known = annotations >= 0
    np.testing.assert_array_equal(targets[known], annotations[known])
    assert not bool(pullback(jnp.ones_like(targets))[0].any())


def test_online_targets_reject_another_name():
    with pytest.raises(ValueError, match="'sharp' is unknown"):
        online_targets(jnp.zeros((1, 1)), jnp.zeros((1, 1), jnp.int8), sharpening="sharp")


# adaptive_thresholds


def brute_force_thresholds(scores, annotations, visits, target, min_count, min_known, bins):
    """Tries every edge on every class; target is (positive precision, negative precision)."""
    edges = np.arange(bins + 1, dtype=np.float32) / np.float32(bins)
    positive, negative = [], []
    for c in range(scores.shape[1]):
        counted = (annotations[:, c] >= 0) & (visits > 0) & np.isfinite(scores[:, c])
        score, label = np.clip(scores[counted, c], 0, 1), annotations[counted, c]
        enough = all((label == kind).sum() >= max(min_known, 1) for kind in (0, 1))
        low, high = 2.0, -1.0
        for edge in edges:
            above, below = label[score >= edge], label[score < edge]
            if len(above) >= max(min_count, 1) and enough:
                share = np.float32((above == 1).sum()) / np.float32(len(above))
                if share >= np.float32(target[0]):
                    low = min(low, edge)
            if len(below) >= max(min_count, 1) and enough:
                share = np.float32((below == 0).sum()) / np.float32(len(below))
                if share >= np.float32(target[1]):
                    high = max(high, edge)
        positive.append(low)
        negative.append(high)
    return np.array(positive, np.float32), np.array(negative, np.float32)


matrix = st.deferred(
    lambda: st.one_of(
        hnp.arrays(np.float32, (N, C), elements=st.floats(0, 1, width=32)),
        # on bin edges, with the ends 0 and 1 among them
        hnp.arrays(np.int64, (N, C), elements=st.integers(0, 16)).map(
            lambda k: (k / 16).astype(np.float32)
        ),
    )
)
annotation_matrix = hnp.arrays(np.int8, (N, C), elements=st.integers(-1, 1))
visit_vector = hnp.arrays(np.int32, (N,), elements=st.integers(0, 3))
wild_matrix = hnp.arrays(np.float32, (N, C), elements=st.floats(width=32))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    matrix,
    annotation_matrix,
    visit_vector,
    st.floats(0, 1, width=32, allow_subnormal=False),
    st.floats(0, 1, width=32, allow_subnormal=False),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_adaptive_thresholds_equal_brute_force(
    scores, annotations, visits, positive_precision, negative_precision, min_count, min_known
):
    positive, negative = jit_thresholds(
        scores,
        annotations,
        visits,
        positive_precision=positive_precision,
        negative_precision=negative_precision,
        min_count=min_count,
        min_known=min_known,
        bins=16,
    )
    expected = brute_force_thresholds(
        scores,
        annotations,
        visits,
        (positive_precision, negative_precision),
        min_count,
        min_known,
        16,
    )
    np.testing.assert_array_equal(positive, expected[0])
    np.testing.assert_array_equal(negative, expected[1])


def test_adaptive_thresholds_by_hand():
    scores = np.array([[0.9], [0.8], [0.6], [0.4], [0.3], [0.1], [0.95], [0.97]], np.float32)
    annotations = np.array([[1], [1], [0], [1], [0], [0], [-1], [0]], np.int8)
    visits = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.int32)  # the last row has no score yet
    positive, negative = jit_thresholds(
        scores, annotations, visits, positive_precision=0.75, negative_precision=1.0, bins=16
    )
    # Positives: 3 of 4 from 0.4 on, the edge above 0.3 is 5/16. Negatives: 2 of 2 below 6/16.
    assert float(positive[0]) == 5 / 16
    assert float(negative[0]) == 6 / 16
    positive, negative = jit_thresholds(
        scores,
        annotations,
        visits,
        positive_precision=0.75,
        negative_precision=1.0,
        min_count=3,
        bins=16,
    )
    assert float(positive[0]) == 5 / 16
    assert float(negative[0]) < 0


def test_a_class_with_too_few_known_of_either_kind_recovers_nothing():
    scores = np.array([[0.9, 0.9], [0.8, 0.8], [0.3, 0.3], [0.1, 0.1], [0.2, 0.1]], np.float32)
    annotations = np.array([[1, 1], [1, -1], [0, 0], [0, 0], [0, 0]], np.int8)
    visits = np.array([1, 1, 1, 1, 0], np.int32)  # the third negative has no score yet
    for min_known, calibrated in ((1, [True, True]), (2, [True, False]), (3, [False, False])):
        positive, negative = jit_thresholds(
            scores,
            annotations,
            visits,
            positive_precision=1.0,
            negative_precision=1.0,
            min_known=min_known,
            bins=16,
        )
        # The edge above 0.3 and the edge below the lowest known positive.
        np.testing.assert_array_equal(positive, np.where(calibrated, 5 / 16, 2.0))
        np.testing.assert_array_equal(negative, np.where(calibrated, [12 / 16, 14 / 16], -1.0))


def test_targets_may_differ_by_class():
    scores = np.tile(np.array([[0.9], [0.7], [0.5]], np.float32), (1, 2))
    annotations = np.tile(np.array([[1], [0], [1]], np.int8), (1, 2))
    positive, _ = jit_thresholds(
        scores,
        annotations,
        np.ones(3, np.int32),
        positive_precision=jnp.array([1.0, 0.6]),
        negative_precision=1.0,
        bins=8,
    )
    np.testing.assert_array_equal(positive, [6 / 8, 0.0])


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_known_on_one_side_only_cannot_be_calibrated(label):
    # As in the single-positive protocol: every precision would be 1.
    scores = np.linspace(0, 1, N * C, dtype=np.float32).reshape(N, C)
    positive, negative = jit_thresholds(
        scores,
        np.full((N, C), label, np.int8),
        np.ones(N, np.int32),
        positive_precision=0.9,
        negative_precision=0.9,
    )
    assert bool((positive > 1).all())
    assert bool((negative < 0).all())
    recovered, weight = jit_recover(
        scores,
        np.ones(N, np.int32),
        np.full((N, C), -1, np.int8),
        positive_threshold=positive,
        negative_threshold=negative,
    )
    assert not bool(weight.any())
    assert not bool(recovered.any())


def test_nothing_known_or_visited_recovers_nothing():
    scores = np.full((N, C), 0.7, np.float32)
    for annotations, visits in ((-1, 1), (1, 0)):
        positive, negative = jit_thresholds(
            scores,
            np.full((N, C), annotations, np.int8),
            np.full(N, visits, np.int32),
            positive_precision=0.0,
            negative_precision=0.0,
        )
        assert bool((positive > 1).all())
        assert bool((negative < 0).all())


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(matrix, annotation_matrix, visit_vector)
def test_thresholds_keep_their_promise_on_the_known_entries(scores, annotations, visits):
    """What `recover_labels` would do with the known entries reaches the precision asked for."""
    positive, negative = jit_thresholds(
        scores,
        annotations,
        visits,
        positive_precision=0.75,
        negative_precision=0.75,
        min_count=2,
        bins=16,
    )
    counted = (annotations >= 0) & (visits > 0)[:, None]
    for side, taken in (
        (1, counted & (scores >= np.asarray(positive))),
        (0, counted & (scores < np.asarray(negative))),
    ):
        for c in range(C):
            labels = annotations[taken[:, c], c]
            assert len(labels) != 1
            assert len(labels) == 0 or (labels == side).mean() >= 0.75


@pytest.mark.parametrize("bins", [0, 3, 100, -4])
def test_bins_must_be_a_power_of_two(bins):
    with pytest.raises(ValueError, match=f"power of two, found {bins}"):
        adaptive_thresholds(
            np.zeros((1, 1), np.float32),
            np.zeros((1, 1), np.int8),
            np.zeros(1, np.int32),
            positive_precision=0.9,
            negative_precision=0.9,
            bins=bins,
        )


def test_histogram_memory_is_a_column_not_the_matrix():
    n, c = 4096, 64
    compiled = jit_thresholds.lower(
        jax.ShapeDtypeStruct((n, c), jnp.float32),
        jax.ShapeDtypeStruct((n, c), jnp.int8),
        jax.ShapeDtypeStruct((n,), jnp.int32),
        positive_precision=0.9,
        negative_precision=0.9,
        bins=16,
    ).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this backend reports no memory analysis")
    assert analysis.temp_size_in_bytes < n * c


# expected_thresholds


def of_class(c, scores, annotations, visits):
    """(known annotations, scores of unknown entries) of the visited rows of a class."""
    seen = (visits > 0) & np.isfinite(scores[:, c])
    known = annotations[:, c] >= 0
    return annotations[seen & known, c], np.clip(scores[seen & ~known, c], 0, 1)


def brute_force_expected(scores, annotations, visits, target, min_count, min_known, bins):
    """As `brute_force_thresholds`, of unknown entries, in float64; also by how much each is met."""
    edges = np.arange(bins + 1) / bins
    positive, negative, margins = [], [], []
    for c in range(scores.shape[1]):
        known, score = of_class(c, scores, annotations, visits)
        middle = np.minimum((np.floor(score * bins) + 0.5) / bins, 1.0)
        low, high = 2.0, -1.0
        for edge in edges:
            above, below = middle[score >= edge], 1 - middle[score < edge]
            if not all((known == kind).sum() >= min_known for kind in (0, 1)):
                continue
            if len(above) >= max(min_count, 1):
                margins.append(above.mean() - target[0])
                if margins[-1] >= 0:
                    low = min(low, edge)
            if len(below) >= max(min_count, 1):
                margins.append(below.mean() - target[1])
                if margins[-1] >= 0:
                    high = max(high, edge)
        positive.append(low)
        negative.append(high)
    return np.array(positive), np.array(negative), np.array(margins)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    matrix,
    annotation_matrix,
    visit_vector,
    st.floats(0, 1, width=32, allow_subnormal=False),
    st.floats(0, 1, width=32, allow_subnormal=False),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_expected_thresholds_equal_brute_force(
    scores, annotations, visits, positive_precision, negative_precision, min_count, min_known
):
    target = (positive_precision, negative_precision)
    expected = brute_force_expected(scores, annotations, visits, target, min_count, min_known, 16)
    # Where a mean is the target but for rounding, either edge is right.
    hypothesis.assume(not (np.abs(expected[2]) < 1e-6).any())
    positive, negative = jit_expected(
        scores,
        annotations,
        visits,
        positive_precision=positive_precision,
        negative_precision=negative_precision,
        min_count=min_count,
        min_known=min_known,
        bins=16,
    )
    np.testing.assert_array_equal(positive, expected[0])
    np.testing.assert_array_equal(negative, expected[1])


def test_expected_thresholds_by_hand():
    scores = np.array([[0.95], [0.85], [0.7], [0.3], [0.1], [0.05], [0.99], [0.99]], np.float32)
    annotations = np.array([[-1], [-1], [-1], [-1], [-1], [-1], [0], [1]], np.int8)
    visits = np.ones(8, np.int32)
    positive, negative = jit_expected(
        scores, annotations, visits, positive_precision=0.8, negative_precision=0.9, bins=16
    )
    # Middles of the bins, in 32nds: 31, 27, 23, 9, 3, 1. The first three have a mean of 81/96, with
    # the fourth 90/128; below, 1 minus the last two has one of 60/64, with the fourth 83/96.
    assert float(positive[0]) == 5 / 16  # the edge above 0.3
    assert float(negative[0]) == 4 / 16  # the edge below 0.3
    # What the known entries are labelled does not matter, that both kinds are there does.
    annotations[6] = 1
    positive, negative = jit_expected(
        scores, annotations, visits, positive_precision=0.8, negative_precision=0.9, bins=16
    )
    assert float(positive[0]) > 1
    assert float(negative[0]) < 0


def test_expected_thresholds_keep_their_promise_where_scores_are_calibrated():
    rng = np.random.default_rng(3)
    scores = rng.beta(0.3, 0.9, (200_000, 2)).astype(np.float32)
    labels = rng.random(scores.shape) < scores
    annotations = np.where(rng.random(scores.shape) < 0.1, labels, -1).astype(np.int8)
    positive, negative = jit_expected(
        scores,
        annotations,
        np.ones(len(scores), np.int32),
        positive_precision=0.9,
        negative_precision=0.985,
    )
    for c in range(2):
        assert abs(labels[scores[:, c] >= positive[c], c].mean() - 0.9) < 0.01
        assert abs((~labels[scores[:, c] < negative[c], c]).mean() - 0.985) < 0.003


def test_expected_thresholds_of_a_large_class_are_those_of_exact_sums():
    """The few entries below an edge count as such, not as a difference of sums over a million."""
    bins, rng = 1024, np.random.default_rng(5)
    scores = rng.beta(2.0, 2.0, (1 << 20, 1)).astype(np.float32)
    annotations = np.full(scores.shape, -1, np.int8)
    annotations[:2, 0] = 0, 1
    place = np.minimum(np.floor(scores[2:, 0] * bins), bins).astype(int)
    entries = np.bincount(place, minlength=bins + 1)
    negatives = entries * (1 - np.minimum((np.arange(bins + 1) + 0.5) / bins, 1.0))
    below, right = np.cumsum(entries)[:-1], np.cumsum(negatives)[:-1]  # below edge k + 1
    precision = right / np.maximum(below, 1)
    for edge in (3, 5, 8, 12, 20):
        # Between the precision below this edge and below the next.
        target = float((precision[edge - 1] + precision[edge]) / 2)
        assert precision[edge] < target < precision[edge - 1]
        _, negative = jit_expected(
            scores, annotations, np.ones(len(scores), np.int32),
            positive_precision=0.9, negative_precision=target, bins=bins,
        )  # fmt: skip
        assert float(negative[0]) == edge / bins


# matched_thresholds


def brute_force_matched(scores, annotations, visits, coverages, min_known, bins):
    """Counts what lies beyond each edge; also how far each count is from the most allowed."""
    positive, negative, margins = [], [], []
    for c in range(scores.shape[1]):
        known, score = of_class(c, scores, annotations, visits)
        low, high = 2.0, -1.0
        if all((known == kind).sum() >= max(min_known, 1) for kind in (0, 1)):
            most = coverages[1] * known.mean() * len(score)
            fewest = coverages[0] * (1 - known.mean()) * len(score)
            for edge in np.arange(bins + 1) / bins:
                over, under = most - (score >= edge).sum(), fewest - (score < edge).sum()
                # Of a share of nothing nothing is rounded.
                margins += [x for x, share in zip((under, over), coverages, strict=True) if share]
                low = min(low, edge) if over >= 0 else low
                high = max(high, edge) if under >= 0 else high
        positive.append(low)
        negative.append(high)
    return np.array(positive), np.array(negative), np.array(margins)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    matrix,
    annotation_matrix,
    visit_vector,
    st.tuples(*[st.floats(0, 1, width=32, allow_subnormal=False)] * 2),
    st.integers(0, 3),
)
def test_matched_thresholds_equal_brute_force(scores, annotations, visits, coverages, min_known):
    *expected, margins = brute_force_matched(scores, annotations, visits, coverages, min_known, 16)
    # Where a count is the most allowed but for rounding, either edge is right.
    hypothesis.assume(not (np.abs(margins) < 1e-5).any())
    positive, negative = jit_matched(
        scores,
        annotations,
        visits,
        negative_coverage=coverages[0],
        positive_coverage=coverages[1],
        min_known=min_known,
        bins=16,
    )
    np.testing.assert_array_equal(positive, expected[0])
    np.testing.assert_array_equal(negative, expected[1])


def test_matched_thresholds_by_hand():
    """One in four known is positive: two of eight unknown ones are to be, and six negative."""
    unknown = [0.95, 0.9, 0.7, 0.6, 0.4, 0.3, 0.1, 0.05]
    scores = np.array([[s] for s in [*unknown, 0.5, 0.5, 0.5, 0.5]], np.float32)
    annotations = np.array([[-1]] * 8 + [[1], [0], [0], [0]], np.int8)
    visits = np.ones(12, np.int32)
    every = {"positive_coverage": 1.0, "negative_coverage": 1.0}
    positive, negative = jit_matched(scores, annotations, visits, **every, bins=16)
    assert float(positive[0]) == 12 / 16  # the edge above 0.7
    assert float(negative[0]) == 14 / 16  # the edge below 0.9
    recovered, weight = jit_recover(
        scores,
        visits,
        annotations,
        positive_threshold=positive,
        negative_threshold=negative,
        soft=False,
    )
    assert recovered[:8, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert weight[:8, 0].tolist() == [1] * 8
    # The surest positive, which is half of them, and the two surest negatives, a third.
    shares = {"positive_coverage": 0.5, "negative_coverage": 0.34}
    positive, negative = jit_matched(scores, annotations, visits, **shares, bins=16)
    assert float(positive[0]) == 15 / 16
    assert float(negative[0]) == 4 / 16
    # A share of nothing is nothing.
    positive, negative = jit_matched(
        scores, annotations, visits, positive_coverage=0.0, negative_coverage=0.0, bins=16
    )
    assert not (scores[:8] >= positive).any()
    assert not (scores[:8] < negative).any()
    # With fewer known positives than asked for, nothing is recovered.
    positive, negative = jit_matched(scores, annotations, visits, **every, min_known=2, bins=16)
    assert float(positive[0]) > 1
    assert float(negative[0]) < 0


@pytest.mark.parametrize(("known_positives", "known"), [(1, 3), (2, 3), (1, 5), (3, 7), (5, 49)])
def test_matched_thresholds_miss_no_label_by_rounding(known_positives, known):
    """As many unknown as known: as many positives, and as many negatives, are due as are known."""
    scores = (np.arange(known) + 0.5)[:, None].astype(np.float32) / 64
    annotations = np.zeros((known, 1), np.int8)
    annotations[:known_positives] = 1
    positive, negative = jit_matched(
        np.concatenate([scores, scores]),
        np.concatenate([annotations, np.full_like(annotations, -1)]),
        np.ones(2 * known, np.int32),
        positive_coverage=1.0,
        negative_coverage=1.0,
        bins=64,
    )
    assert float(positive[0]) == float(negative[0]) == (known - known_positives) / 64


# recover_labels

threshold_vector = st.one_of(
    hnp.arrays(np.float32, (C,), elements=st.floats(-2, 2, width=32)),
    st.sampled_from([0.0, 0.5, 1.0]).map(lambda t: np.full(C, t, np.float32)),
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    wild_matrix,
    annotation_matrix,
    visit_vector,
    threshold_vector,
    threshold_vector,
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.booleans(),
)
def test_known_entries_never_change_and_outputs_stay_in_range(
    scores, annotations, visits, positive_threshold, negative_threshold, soft, power, active
):
    """Whatever the scores: nan, infinite, subnormal, outside [0, 1]."""
    recovered, weight = map(
        np.asarray,
        jit_recover(
            scores,
            visits,
            annotations,
            positive_threshold=positive_threshold,
            negative_threshold=negative_threshold,
            soft=soft,
            confidence_power=power,
            active=active,
        ),
    )
    assert recovered.dtype == weight.dtype == np.float32
    known = annotations >= 0
    np.testing.assert_array_equal(recovered[known], annotations[known])
    assert not weight[known].any()
    assert ((recovered >= 0) & (recovered <= 1)).all()
    assert ((weight >= 0) & (weight <= 1)).all()
    assert not weight[visits == 0].any()
    assert not weight[~np.isfinite(scores)].any()
    assert not recovered[~known & (visits == 0)[:, None]].any()
    if not active:
        assert not weight.any()
        assert not recovered[~known].any()


SCORES = np.array([[0.9, 0.9, 0.9], [0.5, 0.1, 0.6], [0.05, 0.7, 0.3]], np.float32)
UNKNOWN = np.full((3, 3), -1, np.int8)
VISITED = np.ones(3, np.int32)


def test_hard_labels_by_hand():
    annotations = UNKNOWN.copy()
    annotations[0, 0], annotations[2, 1] = 0, 1
    recovered, weight = jit_recover(
        SCORES,
        np.array([1, 1, 0], np.int32),
        annotations,
        positive_threshold=np.float32(0.6),
        negative_threshold=np.float32(0.5),
        soft=False,
        confidence_power=3.0,
    )
    # 0.5 is not below 0.5, 0.6 is from 0.6 on; row 2 has no score yet.
    np.testing.assert_array_equal(recovered, [[0, 1, 1], [0, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(weight, [[0, 1, 1], [0, 1, 1], [0, 0, 0]])


def test_soft_labels_by_hand():
    recovered, weight = jit_recover(
        SCORES,
        VISITED,
        UNKNOWN,
        positive_threshold=0.65,
        negative_threshold=0.2,
        confidence_power=2.0,
    )
    np.testing.assert_allclose(recovered, [[0.9, 0.9, 0.9], [0, 0.1, 0], [0.05, 0.7, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        weight, [[0.64, 0.64, 0.64], [0, 0.64, 0], [0.81, 0.16, 0]], rtol=1e-5
    )


def test_thresholds_per_class():
    _, weight = jit_recover(
        SCORES,
        VISITED,
        UNKNOWN,
        positive_threshold=jnp.array([0.5, 0.8, 2.0]),
        negative_threshold=jnp.array([-1.0, 0.2, 0.4]),
        soft=False,
    )
    np.testing.assert_array_equal(weight, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


def test_every_unknown_entry_can_be_recovered():
    for threshold in (0.0, 0.5):
        recovered, weight = jit_recover(
            SCORES, VISITED, UNKNOWN, positive_threshold=threshold, negative_threshold=threshold
        )
        np.testing.assert_array_equal(recovered, SCORES)
        assert bool((weight == 1).all())


def test_contradicting_thresholds_leave_an_entry_open():
    _, weight = jit_recover(
        SCORES, VISITED, UNKNOWN, positive_threshold=0.4, negative_threshold=0.65, soft=False
    )
    np.testing.assert_array_equal(weight, [[1, 1, 1], [0, 1, 0], [1, 1, 1]])


def test_warm_up_and_thresholds_are_traced_not_compiled_in():
    recover = jax.jit(
        lambda active, positive, negative: recover_labels(
            SCORES,
            VISITED,
            UNKNOWN,
            positive_threshold=positive,
            negative_threshold=negative,
            active=active,
        )
    )
    _, cold = recover(jnp.bool_(False), jnp.full(3, 0.5), jnp.full(3, 0.5))
    _, warm = recover(jnp.bool_(True), jnp.full(3, 0.5), jnp.full(3, 0.5))
    _, strict = recover(jnp.bool_(True), jnp.full(3, 0.8), jnp.full(3, 0.08))
    assert (float(cold.sum()), float(warm.sum()), float(strict.sum())) == (0, 9, 4)
    assert recover._cache_size() == 1


def by_precision(thresholds):
    def of(*arrays, precision):
        return thresholds(
            *arrays, positive_precision=precision, negative_precision=precision, min_count=3
        )

    return of


def by_coverage(*arrays, precision):
    return matched_thresholds(*arrays, positive_coverage=precision, negative_coverage=precision)


@pytest.mark.parametrize(
    "thresholds",
    [by_precision(adaptive_thresholds), by_precision(expected_thresholds), by_coverage],
    ids=["adaptive", "expected", "matched"],
)
def test_sharded_recovery_is_bit_equal(mesh, thresholds):
    rng = np.random.default_rng(5)
    n, c = 256, 7
    scores = rng.random((n, c)).astype(np.float32)
    labels = (rng.random((n, c)) < 0.5 * scores + 0.2).astype(np.int8)
    annotations = np.where(rng.random((n, c)) < 0.4, labels, -1).astype(np.int8)
    visits = rng.integers(0, 3, n).astype(np.int32)

    def whole(scores, visits, annotations, labels, precision):
        positive, negative = thresholds(scores, annotations, visits, precision=precision)
        recovered, weight = jit_recover(
            scores,
            visits,
            annotations,
            positive_threshold=positive,
            negative_threshold=negative,
            confidence_power=1.0,
        )
        counts = recovery_counts(recovered, weight, annotations, labels)
        return positive, negative, recovered, weight, counts

    arrays = (scores, visits, annotations, labels)
    plain = jax.jit(whole)(*arrays, np.float32(0.6))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    alike = NamedSharding(mesh, PartitionSpec())
    sharded_whole = jax.jit(whole, out_shardings=(alike, alike, rows, rows, alike))
    placed = [put(mesh, array, "data") for array in arrays]
    precision = put(mesh, np.float32(0.6))
    with jax.transfer_guard("disallow"):
        sharded = sharded_whole(*placed, precision)
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sharded[3].sharding == rows
    assert 0 < float(np.asarray(sharded[3] > 0).mean()) < 1
    # No device ever gathers the matrix: the histogram is summed, not the scores moved.
    gathered = [
        line
        for line in sharded_whole.lower(*placed, precision).compile().as_text().splitlines()
        if "all-gather(" in line or "all-to-all(" in line
    ]
    assert not gathered


# recovery_counts, recovery_summary


def test_counts_and_summary_by_hand():
    annotations = np.array([[-1, 1], [-1, -1], [-1, -1], [-1, -1], [0, -1]], np.int8)
    labels = np.array([[1, 1], [1, 0], [0, -1], [1, 1], [0, 1]], np.int8)
    recovered = np.array([[0.9, 1.0], [0.2, 0.5], [0.8, 0.9], [0.0, 0.9], [0, 0.1]], np.float32)
    weight = np.array([[1.0, 0.0], [0.6, 1.0], [0.6, 1.0], [0.0, 0.8], [0, 0.8]], np.float32)
    counts = jax.jit(recovery_counts)(recovered, weight, annotations, labels)
    assert all(field.dtype == jnp.int32 for field in counts)
    expected = RecoveryCounts(
        hidden_positives=[3, 2],
        hidden_negatives=[1, 1],
        recovered_positives=[2, 2],
        recovered_negatives=[1, 1],
        correct_positives=[1, 1],
        correct_negatives=[0, 0],
    )
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(getattr(counts, name), value, err_msg=name)
    summary = recovery_summary(counts)
    assert summary["overall"] == pytest.approx(
        {
            "positive_precision": 2 / 4,
            "positive_recall": 2 / 5,
            "negative_precision": 0.0,
            "negative_recall": 0.0,
            "coverage": 6 / 7,
        }
    )
    per_class = summary["per_class"]
    np.testing.assert_allclose(per_class["positive_precision"], [1 / 2, 1 / 2])
    np.testing.assert_allclose(per_class["positive_recall"], [1 / 3, 1 / 2])
    np.testing.assert_allclose(per_class["coverage"], [3 / 4, 1.0])


def test_a_summary_of_nothing_is_nan():
    zeros = RecoveryCounts(*(np.zeros(2, np.int32) for _ in range(6)))
    summary = recovery_summary(zeros)
    assert all(np.isnan(value) for value in summary["overall"].values())
    assert all(np.isnan(value).all() for value in summary["per_class"].values())


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    hnp.arrays(np.float32, (N, C), elements=st.floats(0, 1, width=32)),
    annotation_matrix,
    annotation_matrix,
    st.booleans(),
)
def test_counts_are_consistent(scores, annotations, labels, soft):
    recovered, weight = jit_recover(
        scores,
        np.ones(N, np.int32),
        annotations,
        positive_threshold=np.full(C, 0.7, np.float32),
        negative_threshold=np.full(C, 0.2, np.float32),
        soft=soft,
        confidence_power=1.0,
        active=True,
    )
    counts = recovery_counts(recovered, weight, annotations, labels)
    hidden = ((annotations < 0) & (labels >= 0)).sum(0)
    np.testing.assert_array_equal(counts.hidden_positives + counts.hidden_negatives, hidden)
    assert bool((counts.correct_positives <= counts.recovered_positives).all())
    assert bool((counts.correct_negatives <= counts.hidden_negatives).all())
    assert bool(((counts.recovered_positives + counts.recovered_negatives) <= hidden).all())
    as_positive = (annotations < 0) & (labels >= 0) & (scores >= np.float32(0.7))
    np.testing.assert_array_equal(counts.recovered_positives, as_positive.sum(0))


def test_numbers_of_recovered_labels_by_class():
    recovered = np.array([[0.5, 0.0, 1.0], [0.4, 0.2, 0.9], [1.0, 0.1, 0.0]], np.float32)
    weight = np.array([[0.1, 0.0, 0.0], [1.0, 0.3, 1.0], [0.5, 1.0, 0.0]], np.float32)
    positives, negatives = recovered_numbers(recovered, weight)
    assert positives.tolist() == [2, 0, 1]
    assert negatives.tolist() == [1, 2, 0]
