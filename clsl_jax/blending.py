"""Label-specific features: the prototypes of classes, and features blended with others'.

Where an image's features of an unknown label are blended with those of a known positive, or with a
prototype, the label is known in part.

Pure functions of one batch. Source: Pu et al., Semantic-Aware Representation Blending for
Multi-Label Image Recognition with Partial Labels, arXiv 2203.02172 (SARB), where the shares are
trained and a class has ten prototypes.

Letters: B batch, C classes, D width of the features. Annotations are 1 positive, 0 negative, -1
unknown.
"""

import jax
import jax.numpy as jnp

from clsl_jax.losses import ElementwiseLoss, known_loss

# Of products: a TPU would take bfloat16 for float32, a GPU TensorFloat-32.
_WHOLE = jax.lax.Precision.HIGHEST


def update_prototypes(
    prototypes: jax.Array, semantic: jax.Array, annotations: jax.Array, decay: float
) -> jax.Array:
    """Moves each class's prototype towards the features of the batch's known positives.

    Args:
      prototypes: float32 [C, D]; zeros before the first known positive.
      semantic: [B, C, D], label-specific features.
      annotations: [B, C].
      decay: of the moving average, in [0, 1).

    Returns:
      float32 [C, D]; as it was where the batch has no known positive of a class.
    """
    positive = (annotations == 1).astype(jnp.float32)
    features = jax.lax.stop_gradient(semantic).astype(jnp.float32)
    count = jnp.sum(positive, axis=0)[:, None]
    total = jnp.einsum("bc,bcd->cd", positive, features, precision=_WHOLE)
    mean = total / jnp.maximum(count, 1.0)
    first = jnp.all(prototypes == 0.0, axis=1, keepdims=True)
    moved = jnp.where(first, mean, decay * prototypes + (1.0 - decay) * mean)
    return jnp.where(count > 0, moved, prototypes)


def prototype_scores(semantic: jax.Array, prototypes: jax.Array) -> jax.Array:
    """Likeness of each label-specific feature to its class's prototype.

    Args:
      semantic: [B, C, D].
      prototypes: [C, D].

    Returns:
      float32 [B, C] in [0, 1]: (1 + cosine) / 2.

    Source: the across-images part of Chen et al., Heterogeneous Semantic Transfer for Multi-Label
    Recognition with Partial Labels, arXiv 2205.11131 (prototypes of each class, cosine likeness).
    """
    features = semantic.astype(jnp.float32)
    dot = jnp.einsum("bcd,cd->bc", features, prototypes, precision=_WHOLE)
    norms = jnp.linalg.norm(features, axis=-1) * jnp.linalg.norm(prototypes, axis=-1)
    return 0.5 * (1.0 + dot / jnp.maximum(norms, 1e-6))


def known_before(annotations: jax.Array) -> jax.Array:
    """Where a label is unknown and the image before it in the batch is known to have it.

    Args:
      annotations: [B, C].

    Returns:
      bool [B, C].
    """
    return (annotations < 0) & (jnp.roll(annotations, 1, axis=0) == 1)


def one_unknown(key: jax.Array, annotations: jax.Array, prototypes: jax.Array) -> jax.Array:
    """Draws an unknown label of each image among the classes that have a prototype.

    Args:
      key: of the draw.
      annotations: [B, C].
      prototypes: [C, D]; zeros for none yet.

    Returns:
      bool [B, C], at most one True in each row.
    """
    candidates = (annotations < 0) & jnp.any(prototypes != 0.0, axis=-1)
    draws = jnp.where(candidates, jax.random.uniform(key, annotations.shape), -1.0)
    chosen = jax.nn.one_hot(jnp.argmax(draws, axis=1), annotations.shape[1], dtype=bool)
    return chosen & candidates


def blend(semantic: jax.Array, other: jax.Array, where: jax.Array, share: float) -> jax.Array:
    """Features of which some are blended: ``share own + (1 - share) other``.

    Args:
      semantic: [B, C, D].
      other: [B, C, D] or [C, D].
      where: bool [B, C].
      share: of an image itself, in (0, 1).

    Returns:
      [B, C, D].
    """
    blended = share * semantic + (1.0 - share) * other.astype(semantic.dtype)
    return jnp.where(where[..., None], blended, semantic)


def blending_loss(
    logits: jax.Array,
    annotations: jax.Array,
    where: jax.Array,
    *,
    elementwise: ElementwiseLoss,
    share: float,
) -> jax.Array:
    """Mean loss over the known labels and the blended ones, whose target is ``1 - share``.

    Args:
      logits: [B, C], of the blended features.
      annotations: [B, C].
      where: bool [B, C], unknown labels whose features were blended with those of a known positive.
      elementwise: loss of logits and targets.
      share: as in `blend`.

    Returns:
      Scalar.
    """
    targets = jnp.where(where, 1.0 - share, annotations)
    return known_loss(elementwise(logits, targets), (annotations >= 0) | where)
