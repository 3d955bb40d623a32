"""Co-occurrence, adjacency and graph convolution: by hand, against NumPy loops, as properties."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clsl_jax.models import graph


def test_counts_positives_among_known_entries_only():
    annotations = jnp.array([[1, 1, -1], [1, 0, 1], [-1, 1, 1]], jnp.int8)
    pairs, counts = graph.cooccurrence(annotations)
    np.testing.assert_array_equal(counts, [[2, 2, 1], [1, 2, 1], [1, 2, 2]])
    np.testing.assert_array_equal(pairs, [[0, 1, 1], [1, 0, 1], [1, 1, 0]])


def test_weights_scale_entries():
    labels = jnp.array([[1.0, 0.5], [1.0, 1.0]])
    weight = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    pairs, counts = graph.cooccurrence(labels, weight)
    np.testing.assert_allclose(counts, [[1.0, 1.0], [0.5, 1.5]])
    np.testing.assert_allclose(pairs, [[0.0, 0.5], [0.5, 0.0]])


def test_hidden_entries_break_no_edge():
    """Two classes that always occur together, a third that never does: edges as of all labels."""
    rng = np.random.default_rng(0)
    labels = (rng.random((3000, 3)) < 0.3).astype(np.int8)
    labels[:, 1] = labels[:, 0]
    labels[:, 2] *= 1 - labels[:, 0]
    for known in (1.0, 0.3, 0.1):
        weight = (rng.random(labels.shape) < known).astype(np.float32)
        adjacency = graph.label_adjacency(labels * weight, weight, 0.4, 0.25)
        np.testing.assert_array_equal(np.asarray(adjacency) > 0, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


def test_soft_labels_keep_an_edge():
    """Probabilities given what is seen of both classes; the truth is 60 % of b among those of a."""
    rng, n, d = np.random.default_rng(1), 20_000, 1.5
    given_b = np.array([[0.9, 0.1], [0.4, 0.6]])  # P(b | a), row a
    joint = np.array([[0.95], [0.05]]) * given_b
    drawn = rng.choice(4, n, p=joint.ravel())
    labels = np.stack([drawn // 2, drawn % 2], axis=1)
    known = rng.random((n, 2)) < 0.2
    # An image's log odds of each class; a known label leaves no doubt.
    seen = d * (rng.normal(size=(n, 2)) + d * labels) - d**2 / 2
    odds = np.exp(np.where(known, np.where(labels == 1, 30, -30), seen))
    both = joint * np.stack([np.ones(n), odds[:, 0]], 1)[:, :, None]
    both = both * np.stack([np.ones(n), odds[:, 1]], 1)[:, None, :]
    both /= both.sum(axis=(1, 2), keepdims=True)
    soft = np.where(known, labels, np.stack([both[:, 1].sum(1), both[:, :, 1].sum(1)], 1))

    pairs, counts = graph.cooccurrence(soft, np.ones_like(soft), given=known)
    assert pairs[0, 1] / counts[0, 1] == pytest.approx(0.6, abs=0.03)
    adjacency = graph.label_adjacency(soft, np.ones_like(soft), 0.4, 0.25, given=known)
    assert adjacency[1, 0] > 0
    # What hardly positive labels make of it, the surer the heavier.
    pairs, counts = graph.cooccurrence(soft, np.abs(2 * soft - 1))
    assert pairs[0, 1] / counts[0, 1] < 0.4


def literal_adjacency(pairs, counts, threshold, smoothing):
    """Entry by entry, from the definition."""
    c = len(counts)
    edges = np.zeros((c, c))
    for i in range(c):
        for j in range(c):
            if i != j and counts[i, j] > 0:
                edges[i, j] = float(pairs[i, j] / counts[i, j] >= threshold)
    weights = np.eye(c)
    for j in range(c):
        weights[:, j] += edges[:, j] * smoothing / (edges[:, j].sum() + 1e-6)
    root = np.diag(weights.sum(1) ** -0.5)
    return weights, root @ weights.T @ root


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 12), st.just(5)), elements=st.integers(-1, 1)),
    st.sampled_from([0.3, 0.4, 0.6]),
)
def test_adjacency_is_the_definition_and_always_finite(annotations, threshold):
    pairs, counts = graph.cooccurrence(annotations)
    weights = graph.reweighted_adjacency(pairs, counts, threshold, 0.25)
    adjacency = jax.jit(graph.normalized_adjacency)(pairs, counts, threshold, 0.25)
    expected = literal_adjacency(np.asarray(pairs), np.asarray(counts), threshold, 0.25)
    np.testing.assert_allclose(weights, expected[0], atol=1e-5)
    np.testing.assert_allclose(adjacency, expected[1], atol=1e-5)
    for c in np.flatnonzero((np.asarray(annotations) != 1).all(axis=0)):
        np.testing.assert_array_equal(adjacency[c], np.eye(5)[c])
        np.testing.assert_array_equal(adjacency[:, c], np.eye(5)[c])


def test_two_layers_by_hand():
    embeddings, adjacency = (
        jnp.array([[1.0, -2.0], [0.5, 1.0]]),
        jnp.array([[1.0, 0.5], [0.0, 1.0]]),
    )
    first, second = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])
    params = {"layer_0": {"kernel": first}, "layer_1": {"kernel": second}}
    nodes = graph.LabelGraph(2).apply({"params": params}, embeddings, adjacency)
    hidden = np.asarray(adjacency) @ np.asarray(embeddings) @ first
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    expected = np.asarray(embeddings) + np.asarray(adjacency) @ hidden @ second
    np.testing.assert_allclose(nodes, expected, rtol=1e-6)


def test_no_layers_create_nothing():
    embeddings = jnp.ones((3, 4))
    nodes, variables = graph.LabelGraph(0).init_with_output(jax.random.key(0), embeddings, None)
    assert nodes is embeddings or np.array_equal(nodes, embeddings)
    assert not variables


def test_layers_without_adjacency_are_an_error():
    with pytest.raises(ValueError, match="graph_layers is 1 but no adjacency"):
        graph.LabelGraph(1).init(jax.random.key(0), jnp.ones((3, 4)), None)
