"""Label statistics against counting, enumeration and scikit-learn's cosine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsl_jax import label_statistics as ls

N, C, K = 60, 5, 3


def example(seed, known=0.5, n=N):
    """Labels of two kinds of images, part of them known."""
    rng = np.random.default_rng(seed)
    kinds = np.array([[0.9, 0.8, 0.1, 0.1, 0.5], [0.1, 0.2, 0.9, 0.7, 0.5]])
    labels = rng.random((n, C)) < kinds[rng.integers(0, 2, n)]
    return labels, np.where(rng.random((n, C)) < known, labels, -1).astype(np.int8)


def mixture(seed):
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.ones(K))
    return ls.Mixture(
        jnp.log(jnp.asarray(prior, jnp.float32)), jnp.asarray(rng.normal(size=(K, C)), jnp.float32)
    )


def test_frequencies_by_hand():
    annotations = jnp.array([[1, 0, -1], [1, -1, -1], [0, 1, -1]], jnp.int8)
    np.testing.assert_allclose(ls.label_frequencies(annotations), [3 / 5, 2 / 4, 1 / 2])
    found = np.asarray(ls.co_occurrence_scores(annotations))
    # Label 1 of image 1, unknown, given label 0: known beside it in image 0 alone, negative there.
    np.testing.assert_allclose(found[1, 1], (0 + 0.5) / (1 + 1), rtol=1e-6)
    # Of image 0, where it is that cell itself: nothing is left but the pseudo-count.
    np.testing.assert_allclose(found[0, 1], 0.5, rtol=1e-6)
    # No other known positive in the image: how frequent the class is.
    np.testing.assert_allclose(found[[0, 1], 0], 0.6, rtol=1e-6)


def test_co_occurrence_scores_are_a_mean_over_known_positives():
    annotations = np.asarray(example(0)[1])
    found = np.asarray(ls.co_occurrence_scores(annotations))
    frequencies = np.asarray(ls.label_frequencies(annotations))
    for n, row in enumerate(annotations):
        for c in range(C):  # a known label speaks neither for itself nor in the counts
            rest = np.delete(annotations, n, axis=0) if row[c] >= 0 else annotations
            expected = [
                ((rest[rest[:, other] == 1, c] == 1).sum() + frequencies[c])
                / ((rest[rest[:, other] == 1, c] >= 0).sum() + 1)
                for other in np.flatnonzero(row == 1)
                if other != c
            ]
            mean = np.mean(expected) if expected else frequencies[c]
            np.testing.assert_allclose(found[n, c], mean, rtol=1e-5)


def test_co_occurrence_scores_promise_nothing_where_nothing_is_to_be_found():
    """Independent labels: known cells are scored as low as unknown ones, and no lower."""
    rng = np.random.default_rng(0)
    labels = (rng.random((2000, 20)) < 0.2).astype(np.int8)
    known = rng.random(labels.shape) < 0.1
    scores = np.asarray(ls.co_occurrence_scores(np.where(known, labels, -1).astype(np.int8)))
    assert scores[known & (labels == 1)].mean() == pytest.approx(
        scores[known & (labels == 0)].mean(), abs=0.02
    )


def enumerated(model, row, ratios):
    """P(label | known labels, evidence) by summing over every completion of the row."""
    prior, on = np.exp(np.asarray(model.log_prior)), 1 / (1 + np.exp(-np.asarray(model.logits)))
    total, positive = 0.0, np.zeros(C)
    free = np.flatnonzero(row < 0)
    for values in itertools.product((0, 1), repeat=len(free)):
        labels = row.astype(float).copy()
        labels[free] = values
        weight = (prior * np.prod(np.where(labels == 1, on, 1 - on), axis=1)).sum()
        weight *= np.exp((ratios * labels)[free].sum())
        total += weight
        positive += weight * labels
    return positive / total


@pytest.mark.parametrize("with_evidence", [False, True])
def test_posterior_equals_enumeration(with_evidence):
    model, (_, annotations) = mixture(1), example(2, n=12)
    ratios = np.random.default_rng(3).normal(size=annotations.shape) if with_evidence else None
    found, shares = ls.mixture_posterior(
        model, jnp.asarray(annotations), None if ratios is None else jnp.asarray(ratios)
    )
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    for i, row in enumerate(annotations):
        given_ratios = np.zeros(C) if ratios is None else ratios[i]
        for c in range(C):  # a known label as if it were not
            asked = row.copy()
            asked[c] = -1
            expected = enumerated(model, asked, given_ratios)[c]
            np.testing.assert_allclose(found[i, c], expected, rtol=1e-4)


def log_likelihood(model, annotations):
    on = 1 / (1 + np.exp(-np.asarray(model.logits, np.float64)))
    row = annotations[:, None, :]
    factors = np.where(row == 1, on, np.where(row == 0, 1 - on, 1.0)).prod(axis=2)
    return np.log(factors @ np.exp(np.asarray(model.log_prior, np.float64))).sum()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_fitting_never_makes_known_labels_less_likely(seed):
    """Expectation maximisation is monotone; with a vanishing prior in the likelihood itself."""
    _, annotations = example(seed)
    model = ls.init_mixture(jax.random.key(seed), jnp.asarray(annotations), K)
    before = log_likelihood(model, annotations)
    for _ in range(3):
        model = ls.fit_mixture(model, jnp.asarray(annotations), iterations=2, prior=1e-3)
        after = log_likelihood(model, annotations)
        # The components' weights have a pseudo-count of 1, which may cost a little.
        assert after >= before - 0.05
        before = after


def test_statistics_tell_more_than_frequencies_where_labels_occur_together():
    labels, annotations = example(4, known=0.6, n=2000)
    model = ls.init_mixture(jax.random.key(0), jnp.asarray(annotations), K)
    model = ls.fit_mixture(model, jnp.asarray(annotations), iterations=60)
    found, _ = ls.mixture_posterior(model, jnp.asarray(annotations))
    hidden = annotations < 0

    def loss(p):
        p = np.broadcast_to(np.asarray(p, np.float64), labels.shape)[hidden]
        return -np.log(np.where(labels[hidden], p, 1 - p)).mean()

    # The process that drew them: the best that can be known.
    kinds = np.array([[0.9, 0.8, 0.1, 0.1, 0.5], [0.1, 0.2, 0.9, 0.7, 0.5]])
    true = ls.Mixture(
        jnp.log(jnp.array([0.5, 0.5])), jnp.asarray(np.log(kinds / (1 - kinds)), jnp.float32)
    )
    best, _ = ls.mixture_posterior(true, jnp.asarray(annotations))
    assert loss(found) < loss(best) + 0.01
    assert loss(best) + 0.1 < loss(ls.label_frequencies(jnp.asarray(annotations)))


def test_evidence_of_a_score_that_is_the_frequency_is_none():
    frequencies = jnp.array([0.2, 0.5])
    scores = jnp.array([[0.2, 0.5], [0.5, 0.2], [1.0, 0.0]])
    found = np.asarray(ls.evidence(scores, frequencies))
    np.testing.assert_allclose(found[0], 0, atol=1e-5)
    np.testing.assert_allclose(found[1], [np.log(4), -np.log(4)], rtol=1e-5)
    assert found[2, 0] > 17
    assert found[2, 1] < -69


def test_sure_scores_of_a_rare_class_keep_their_order():
    """Where other labels say nothing, a posterior is the score, however rare the class."""
    frequency = jnp.array([1e-3, 0.3])
    one = ls.Mixture(jnp.zeros(1), jnp.log(frequency / (1 - frequency))[None])
    statistics = {
        "frequencies": frequency,
        "mixture_prior": one.log_prior,
        "mixture_logits": one.logits,
    }
    stated = np.array([1e-20, 1e-12, 1e-7, 1e-3, 0.5, 0.999, 0.99999, 0.999999])
    scores = jnp.stack([jnp.asarray(stated, jnp.float32), jnp.full(8, 0.3)], axis=1)
    unknown = jnp.full(scores.shape, -1, jnp.int8)
    found = ls.informed_probabilities(statistics, unknown, scores)
    np.testing.assert_allclose(found[:, 0], stated, rtol=1e-4)
    assert (np.diff(np.asarray(found[:, 0])) > 0).all()


def test_statistics_are_kept_as_plain_arrays_and_read_back():
    _, annotations = example(8, n=200)
    annotations = jnp.asarray(annotations)
    kept = ls.fit_statistics(jax.random.key(0), annotations, K)
    np.testing.assert_allclose(kept["frequencies"], ls.label_frequencies(annotations))
    model = ls.Mixture(kept["mixture_prior"], kept["mixture_logits"])
    assert model.logits.shape == (K, C)
    np.testing.assert_allclose(np.exp(model.log_prior).sum(), 1, rtol=1e-5)
    alone = ls.informed_probabilities(kept, annotations)
    np.testing.assert_array_equal(alone, ls.mixture_posterior(model, annotations)[0])
    # A network that says no more than the frequencies adds nothing.
    same = jnp.broadcast_to(kept["frequencies"], annotations.shape)
    np.testing.assert_allclose(
        ls.informed_probabilities(kept, annotations, same), alone, rtol=1e-4, atol=1e-6
    )


def test_rows_without_a_label_say_nothing():
    _, annotations = example(5)
    padded = np.concatenate([annotations, np.full((30, C), -1, np.int8)])
    model = mixture(6)
    plain = ls.fit_mixture(model, jnp.asarray(annotations), iterations=5)
    more = ls.fit_mixture(model, jnp.asarray(padded), iterations=5)
    np.testing.assert_allclose(plain.logits, more.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain.log_prior, more.log_prior, rtol=1e-4)


def test_what_other_labels_say_equals_enumeration():
    """Log odds given the others, whose unknown ones weigh by their scores, less the class's own."""
    model, (_, annotations) = mixture(5), example(6, n=12)
    rng = np.random.default_rng(7)
    frequencies = rng.uniform(0.1, 0.6, C).astype(np.float32)
    scores = rng.uniform(0.05, 0.95, annotations.shape).astype(np.float32)
    found = ls.others_log_ratios(
        {
            "frequencies": jnp.asarray(frequencies),
            "mixture_prior": model.log_prior,
            "mixture_logits": model.logits,
        },
        jnp.asarray(annotations),
        jnp.asarray(scores),
    )
    ratios = np.log(scores / (1 - scores)) - np.log(frequencies / (1 - frequencies))
    for i, row in enumerate(annotations):
        for c in range(C):
            asked, said = row.copy(), ratios[i].copy()
            asked[c], said[c] = -1, 0.0  # neither the label itself nor what its score says
            p = enumerated(model, asked, said)[c]
            expected = np.log(p / (1 - p)) - np.log(frequencies[c] / (1 - frequencies[c]))
            np.testing.assert_allclose(found[i, c], expected, atol=2e-4)


def test_independent_labels_say_nothing_of_one_another():
    _, annotations = example(8)
    statistics = ls.fit_statistics(jax.random.key(0), jnp.asarray(annotations), 1)
    scores = np.random.default_rng(9).uniform(size=annotations.shape)
    found = ls.others_log_ratios(statistics, jnp.asarray(annotations), jnp.asarray(scores))
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-5)
    assert np.abs(np.asarray(found)).max() < 0.3  # pseudo-counts of both estimates differ


def test_products_are_of_whole_float32_on_any_device():
    """A TPU multiplies bfloat16, a GPU TensorFloat-32, unless a product asks for more."""
    annotations = jnp.asarray(example(10)[1])
    for function in (
        lambda a: ls.fit_statistics(jax.random.key(0), a, K),
        ls.co_occurrence_scores,
    ):
        lines = jax.jit(function).lower(annotations).as_text().splitlines()
        found = [line for line in lines if "dot_general" in line]
        assert len(found) == 2
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in found)
