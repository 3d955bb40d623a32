"""What probabilities a network's outputs stand for under the loss it was trained by."""

import jax
import jax.numpy as jnp

from clsl_jax import losses
from clsl_jax.step_options import StepOptions


def calibrated(logits: jax.Array, options: StepOptions) -> jax.Array:
    """Returns the probabilities that logits stand for under the loss they were trained by.

    Args:
      logits: any shape.
      options: of the run.

    Returns:
      float32 in [0, 1], same shape.
    """
    return jax.nn.sigmoid(stated_log_odds(logits, options))


def stated_log_odds(logits: jax.Array, options: StepOptions) -> jax.Array:
    """The log odds of `calibrated`, float32."""
    if options.loss_name == "bce":
        return logits.astype(jnp.float32)
    if options.loss_name == "hill":
        return losses.hill_log_odds(logits, margin=options.margin)
    if options.loss_name == "focal_margin":
        return losses.focal_margin_log_odds(logits, margin=options.margin)
    return losses.asymmetric_log_odds(
        logits, gamma_pos=options.gamma_pos, gamma_neg=options.gamma_neg, clip=options.clip
    )


def stated_probabilities(predictions: jax.Array, options: StepOptions) -> jax.Array:
    """Returns the calibrated probabilities that predictions of `steps.make_predict_step` stand for.

    Args:
      predictions: any shape, in [0, 1].
      options: of the run.

    Returns:
      float32 in [0, 1], same shape.
    """
    if options.evaluate_statistics or options.loss_name == "bce":
        return jnp.asarray(predictions, jnp.float32)
    p = jnp.clip(jnp.asarray(predictions, jnp.float32), 1e-7, 1.0 - 1e-7)
    return calibrated(jnp.log(p) - jnp.log1p(-p), options)
