"""Corrections of assumed negatives against hand arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clsl_jax import corrections, losses

ANNOTATIONS = jnp.array([[1, -1, 0, -1], [-1, -1, -1, -1]], jnp.int8)
LOGITS = jnp.array([[4.0, 3.0, 2.0, -1.0], [0.5, -2.0, 1.0, -3.0]])


def corrected_by(correction, *, share=0.0, active=True, before=None):
    corrected = jnp.zeros((2, 4), bool) if before is None else jnp.asarray(before)
    return corrections.assumed_targets(
        LOGITS,
        losses.binary_cross_entropy(LOGITS, jnp.zeros((2, 4))),
        ANNOTATIONS,
        corrected,
        correction=correction,
        assumed=0.0,
        threshold=0.6,
        share=share,
        active=active,
    )


def unknown(array):
    return np.where(np.asarray(ANNOTATIONS) < 0, np.asarray(array, float), np.nan)


def test_without_correction_every_unknown_label_is_a_negative():
    targets, weights = corrected_by("none")
    np.testing.assert_array_equal(unknown(targets)[unknown(targets) > 0], [])
    np.testing.assert_array_equal(weights, 1)


def test_self_paced_takes_what_the_network_finds_likely():
    """s(0.405) = 0.6: of the unknown logits 3, 0.5 and 1 lie above; none in the first epoch."""
    targets, weights = corrected_by("self_paced")
    expected = [[np.nan, 1, np.nan, 0], [1, 0, 1, 0]]
    np.testing.assert_array_equal(unknown(targets), expected)
    np.testing.assert_array_equal(weights, 1)
    targets, _ = corrected_by("self_paced", active=False)
    assert not (unknown(targets) > 0).any()


def test_the_largest_losses_are_rejected_or_corrected():
    """30 % of six unknown entries are two, rounded up: logits 3 and 1; never a known label."""
    targets, weights = corrected_by("reject", share=0.3)
    np.testing.assert_array_equal(unknown(weights), [[np.nan, 0, np.nan, 1], [1, 1, 0, 1]])
    assert not (unknown(targets) > 0).any()
    targets, weights = corrected_by("correct", share=0.3)
    np.testing.assert_array_equal(unknown(targets), [[np.nan, 1, np.nan, 0], [0, 0, 1, 0]])
    np.testing.assert_array_equal(weights, 1)


def test_what_was_corrected_for_good_stays_and_makes_room_for_the_next():
    before = [[True, True, False, False], [False] * 4]  # a known entry there is not read
    targets, _ = corrected_by("correct_for_good", share=0.2, before=before)
    np.testing.assert_array_equal(unknown(targets), [[np.nan, 1, np.nan, 0], [0, 0, 1, 0]])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.13, 0.5, 1.0])
def test_exactly_the_share_is_taken_even_of_equal_losses(share):
    candidates = np.random.default_rng(0).random((16, 9)) < 0.7
    found = jax.jit(corrections.large_losses)(jnp.ones((16, 9)), candidates, share)
    assert int(found.sum()) == math.ceil(share * int(candidates.sum()) - 1e-4)
    assert not (np.asarray(found) & ~candidates).any()


def test_an_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="self_paced"):
        corrected_by("guess")


def test_targets_carry_no_gradient():
    def total(logits):
        entries = losses.binary_cross_entropy(logits, jnp.zeros((2, 4)))
        targets, weights = corrections.assumed_targets(
            logits,
            entries,
            ANNOTATIONS,
            jnp.zeros((2, 4), bool),
            correction="correct",
            assumed=0.0,
            threshold=0.6,
            share=0.4,
            active=True,
        )
        return (targets * weights).sum()

    np.testing.assert_array_equal(jax.grad(total)(LOGITS), 0)


def test_estimates_descend_their_loss():
    """The step is the gradient of the written loss by automatic differentiation."""
    rng = np.random.default_rng(1)
    start = rng.normal(size=(2, 4))
    said = np.where(ANNOTATIONS >= 0, ANNOTATIONS, 1 / (1 + np.exp(-np.asarray(LOGITS))))

    def loss(estimate_logits):
        # Cole et al.: the network's output is the target of the estimates here; cross entropy up
        # to the entropy of the target, whose gradient in logits is q - target.
        entries = losses.binary_cross_entropy(estimate_logits, jnp.asarray(said))
        expected = losses.expected_positives_loss(estimate_logits, 1.5)
        # Each image for itself: the mean over images without its 1 / B.
        return entries.sum() + 3.0 * 4 * 2 * expected

    with jax.enable_x64(True):
        gradient = jax.grad(loss)(jnp.asarray(start))
    found = corrections.estimate_update(
        jax.nn.sigmoid(jnp.asarray(start)),
        LOGITS,
        ANNOTATIONS,
        rate=0.7,
        positives=1.5,
        positives_weight=3.0,
    )
    expected = 1 / (1 + np.exp(-(start - 0.7 * np.asarray(gradient))))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_estimates_stay_inside():
    found = corrections.estimate_update(
        jnp.array([[0.0, 1.0]]),
        jnp.array([[90.0, -90.0]]),
        jnp.array([[-1, -1]], jnp.int8),
        rate=1e6,
        positives=0.0,
        positives_weight=0.0,
    )
    np.testing.assert_allclose(found, [[1 - 1e-4, 1e-4]], rtol=1e-4)
