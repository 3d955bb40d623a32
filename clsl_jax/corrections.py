"""Targets of unknown labels that are taken for negatives, corrected within the batch.

Pure functions of one batch, without gradient: what methods for missing labels do instead of
recovering from a matrix of scores (`recovery.py`).

Letters: B batch, C classes. Annotations are 1 positive, 0 negative, -1 unknown.
"""

import jax
import jax.numpy as jnp

CORRECTIONS = ("none", "self_paced", "reject", "correct", "correct_for_good")


def self_paced(logits: jax.Array, *, threshold: float, active: jax.Array | bool) -> jax.Array:
    """Where an unknown label is taken for a positive because the network says so.

    With ``p = sigmoid(logits)`` the loss of an unknown label is that of a positive where v = 1, of
    a negative elsewhere::

        v loss(logits, 1) + (1 - v) loss(logits, 0),   v = 1[p > threshold] if active else 0

    The paper corrects in this way every label that is no known positive; known negatives, which it
    has none of, stay negatives here.

    Args:
      logits: [B, C].
      threshold: probability above which it does, in [0, 1).
      active: False takes none (the first epoch); may be traced.

    Returns:
      bool [B, C].

    Source: Zhang et al., Simple and Robust Loss Design for Multi-Label Learning with Missing
    Labels, arXiv 2112.07368 (self-paced loss correction, SPLC).
    """
    probability = jax.nn.sigmoid(jax.lax.stop_gradient(logits).astype(jnp.float32))
    return (probability > threshold) & jnp.asarray(active, bool)


def large_losses(losses: jax.Array, candidates: jax.Array, share: jax.Array | float) -> jax.Array:
    """The candidates with the largest losses of the batch.

    Of n candidates the ``ceil(share n)`` of largest loss. In the paper they are those of loss
    ``> R(t)`` in epoch t = 1, 2, ..., R(t) being the loss with a share (t - 1) delta of losses
    above it (LL-R, LL-Ct), or a share delta (LL-Cp).

    Args:
      losses: [B, C] of the candidates as they are labelled now.
      candidates: bool [B, C].
      share: of the candidates, in [0, 1], rounded up to a whole number, so that a small batch is
        corrected as well; may be traced.

    Returns:
      bool [B, C], True at exactly that many candidates; of equal losses the earlier ones.

    Source: Kim et al., Large Loss Matters in Weakly Supervised Multi-Label Classification, arXiv
    2206.03740.
    """
    flat = jax.lax.stop_gradient(jnp.where(candidates, losses, -jnp.inf)).ravel()
    order = jnp.argsort(-flat)  # stable
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    number = jnp.ceil(share * jnp.sum(candidates) - 1e-4)
    return (rank < number).reshape(losses.shape) & candidates


def assumed_targets(
    logits: jax.Array,
    losses: jax.Array,
    annotations: jax.Array,
    corrected: jax.Array,
    *,
    correction: str,
    assumed: float,
    threshold: float,
    share: jax.Array | float,
    active: jax.Array | bool,
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights where unknown labels are taken for negatives.

    With l the loss of an unknown entry against the target a = `assumed`, and L the entries of
    `large_losses`, its target and weight are::

        none              (a, 1)
        self_paced        (1, 1) where `self_paced`, else (a, 1)               SPLC
        reject            (a, 0) in L, else (a, 1)                             LL-R
        correct           (1, 1) in L, else (a, 1)                             LL-Ct
        correct_for_good  (1, 1) in L and, in later steps, where it once was   LL-Cp

    The paper of the last three, with p = sigmoid(logits), multiplies the loss -log(1 - p) of an
    unknown label by lambda: 0 in L for LL-R, ``log p / log(1 - p)`` in L for LL-Ct, which makes it
    -log p, 1 elsewhere; LL-Cp changes the label itself.

    Args:
      logits: [B, C].
      losses: [B, C], each entry's loss against the target `assumed`.
      annotations: [B, C].
      corrected: bool [B, C], unknown entries that were corrected for good before.
      correction: one of `CORRECTIONS`.
      assumed: the target of an unknown label; 0, or half the smoothing of label smoothing.
      threshold: of `self_paced`.
      share: of `large_losses`.
      active: of `self_paced`.

    Returns:
      targets [B, C] in [0, 1] and weights [B, C], read at unknown entries; without gradient.

    Raises:
      ValueError: an unknown correction.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction {correction!r} is unknown: {', '.join(CORRECTIONS)}")
    unknown = annotations < 0
    positive, weight = corrected & unknown, jnp.ones(annotations.shape, jnp.float32)
    if correction == "self_paced":
        positive |= self_paced(logits, threshold=threshold, active=active)
    elif correction != "none":
        large = large_losses(losses, unknown & ~positive, share)
        if correction == "reject":
            weight = jnp.where(large, 0.0, weight)
        else:
            positive |= large
    return jnp.where(positive, 1.0, assumed), weight


def estimate_update(
    estimates: jax.Array,
    logits: jax.Array,
    annotations: jax.Array,
    *,
    rate: float,
    positives: jax.Array | float,
    positives_weight: float,
) -> jax.Array:
    """One step of the label estimates of a batch towards what the network says.

    A step of gradient descent on the logits of the estimates q, every image for itself::

        BCE(q, sigmoid(logits)) summed over classes + positives_weight * C * expected_positives_loss

    with known labels in the place of what the network says. With p that or the label, z the logit
    of q and k = `positives`::

        z <- z - rate (q - p + positives_weight 2 (mean_n sum_c q_nc - k) / C  q (1 - q))

    The network in turn learns p from q. The paper minimises ``(L(p | q) + L(q | p)) / 2``, where
    what stands after the bar carries no gradient::

        L(p | q) = BCE(p, q) + BCE(p, 1) at known positives + weight * expected_positives_loss(p)

    Here a known label takes the place of p or q instead of having a term of its own.

    Args:
      estimates: [B, C], probabilities in (0, 1).
      logits: [B, C] of the network.
      annotations: [B, C].
      rate: of the step, in units of a logit for each unit of gradient.
      positives, positives_weight: of the expected-positive regularisation.

    Returns:
      The new estimates [B, C], strictly between 0 and 1.

    Source: Cole et al., Multi-Label Learning from Single Positive Labels, arXiv 2106.09708
    (regularised online label estimation, ROLE), which updates p and q by Adam.
    """
    q = jnp.clip(estimates, 1e-4, 1.0 - 1e-4)
    said = jax.nn.sigmoid(jax.lax.stop_gradient(logits).astype(jnp.float32))
    target = jnp.where(annotations >= 0, annotations.astype(jnp.float32), said)
    classes = q.shape[-1]
    excess = jnp.mean(jnp.sum(q, axis=-1)) - positives
    # d/dlogit of BCE is q - target; of the regulariser 2 excess q (1 - q) / C, per image.
    gradient = q - target + positives_weight * 2.0 * excess / classes * q * (1.0 - q)
    moved = jnp.log(q) - jnp.log1p(-q) - rate * gradient
    return jnp.clip(jax.nn.sigmoid(moved), 1e-4, 1.0 - 1e-4)
