"""Prototypes and blending of label-specific features, by hand and by other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clsl_jax import blending, losses
from clsl_jax.models.clsl import CLSLHead

ANNOTATIONS = jnp.array([[1, -1, 0], [-1, 0, -1], [-1, -1, 1]], jnp.int8)


def test_labels_of_the_image_before():
    """Image 1 takes class 0 from image 0; of the others none is known to have what is unknown."""
    found = blending.known_before(ANNOTATIONS)
    expected = np.zeros((3, 3), bool)
    expected[1, 0] = True
    np.testing.assert_array_equal(found, expected)
    around = ANNOTATIONS.at[0, 2].set(-1)  # the image before the first is the last
    assert blending.known_before(around)[0, 2]


def test_one_unknown_label_with_a_prototype_is_drawn():
    prototypes = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    draw = jax.jit(blending.one_unknown)
    draws = np.stack([draw(jax.random.key(k), ANNOTATIONS, prototypes) for k in range(50)])
    # Class 0 has no prototype: of image 0 class 1 is left, of image 1 class 2, of image 2 class 1.
    np.testing.assert_array_equal(draws.sum(0), [[0, 50, 0], [0, 0, 50], [0, 50, 0]])
    unknown = jnp.full((600, 3), -1, jnp.int8)
    drawn = np.asarray(draw(jax.random.key(0), unknown, jnp.ones((3, 2))))
    np.testing.assert_array_equal(drawn.sum(1), 1)
    assert (np.abs(drawn.sum(0) - 200) < 60).all()  # five standard deviations
    assert not draw(jax.random.key(0), jnp.zeros((1, 3), jnp.int8), jnp.ones((3, 2))).any()


def test_blends_and_their_loss_by_hand():
    rng = np.random.default_rng(0)
    semantic = rng.normal(size=(3, 3, 4)).astype(np.float32)
    prototypes = rng.normal(size=(3, 4)).astype(np.float32)
    where = np.zeros((3, 3), bool)
    where[1, 0] = True
    found = blending.blend(jnp.asarray(semantic), jnp.roll(semantic, 1, axis=0), where, 0.25)
    expected = semantic.copy()
    expected[1, 0] = 0.25 * semantic[1, 0] + 0.75 * semantic[0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = blending.blend(jnp.asarray(semantic), prototypes, where, 0.25)
    expected[1, 0] = 0.25 * semantic[1, 0] + 0.75 * prototypes[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    logits = rng.normal(size=(3, 3)).astype(np.float32)
    found = blending.blending_loss(
        jnp.asarray(logits),
        ANNOTATIONS,
        where,
        elementwise=losses.binary_cross_entropy,
        share=0.25,
    )
    # Known: (0, 0) yes, (0, 2) no, (1, 1) no, (2, 2) yes; the blended (1, 0) by three quarters.
    places, targets = [(0, 0), (0, 2), (1, 1), (2, 2), (1, 0)], [1.0, 0.0, 0.0, 1.0, 0.75]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor([logits[p] for p in places]), torch.tensor(targets)
    )
    np.testing.assert_allclose(found, expected.item(), rtol=1e-6)


def test_a_head_classifies_blended_features_as_its_own():
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.normal(size=(3, 2, 2, 8)), jnp.float32)
    embeddings = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    for parts in ({}, {"position_residual": True}, {"sgfe": False}):
        head = CLSLHead(3, encoder_layers=0, rank=6, **parts)
        variables = head.init(jax.random.key(0), features, embeddings, train=False)
        if "position_residual" in parts:  # whose SGFE starts at 0
            variables = jax.tree.map(lambda x: x + 0.1, variables)
        logits, out = head.apply(
            variables, features, embeddings, train=False, blend=lambda v: [v[::-1], v]
        )
        reordered, same = out["blended_logits"]
        np.testing.assert_array_equal(same, logits)
        assert np.abs(np.asarray(reordered - logits)).max() > 1e-6
        plain, out = head.apply(variables, features, embeddings, train=False)
        np.testing.assert_array_equal(plain, logits)
        assert out["blended_logits"] is None


def test_prototypes_by_hand():
    annotations = jnp.array([[1, 0, -1], [1, 1, -1]], jnp.int8)
    features = jnp.arange(12.0).reshape(2, 3, 2)
    first = blending.update_prototypes(jnp.zeros((3, 2)), features, annotations, 0.9)
    np.testing.assert_allclose(first, [[3, 4], [8, 9], [0, 0]])
    second = blending.update_prototypes(first, features + 1, annotations, 0.9)
    np.testing.assert_allclose(second, [[3.1, 4.1], [8.1, 9.1], [0, 0]], rtol=1e-6)


def test_prototype_scores_are_cosines():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    rng = np.random.default_rng(7)
    features, prototypes = rng.normal(size=(4, 3, 6)), rng.normal(size=(3, 6))
    found = blending.prototype_scores(jnp.asarray(features), jnp.asarray(prototypes))
    for c in range(3):
        cosine = pairwise.cosine_similarity(features[:, c], prototypes[c : c + 1])[:, 0]
        np.testing.assert_allclose(found[:, c], (1 + cosine) / 2, rtol=1e-5)
    np.testing.assert_allclose(blending.prototype_scores(features, jnp.zeros((3, 6))), 0.5)


def test_products_are_of_whole_float32_on_any_device():
    """A TPU multiplies bfloat16, a GPU TensorFloat-32, unless a product asks for more."""
    semantic, prototypes = jnp.zeros((3, 3, 6)), jnp.zeros((3, 6))
    for function, arguments in (
        (lambda s, a: blending.update_prototypes(prototypes, s, a, 0.9), (semantic, ANNOTATIONS)),
        (lambda s: blending.prototype_scores(s, prototypes), (semantic,)),
    ):
        lines = jax.jit(function).lower(*arguments).as_text().splitlines()
        (found,) = (line for line in lines if "dot_general" in line)
        assert "precision = [HIGHEST, HIGHEST]" in found
