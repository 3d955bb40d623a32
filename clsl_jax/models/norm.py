"""Batch normalisation with PyTorch's running statistics, always computed in float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """Normalises the last axis over all others, as `torch.nn.BatchNorm1d/2d` does.

    Two things differ from `flax.linen.BatchNorm`: the running variance is the *unbiased* one (n - 1
    below), while the batch itself is normalised by the biased one; and everything up to the
    result is float32, whatever the input's type.

    Variables: `params` scale [D], bias [D]; `batch_stats` mean [D], var [D].

    Attributes:
      momentum: weight of the batch in the running statistics (torch's meaning, 0.1).
      epsilon: added to the variance.
      dtype: type of the result.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [..., D] -> [..., D]; with `train` by the batch's statistics, which it also records."""
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (d,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (d,), jnp.float32)

        x = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            count = x.size // d
            mean = jnp.mean(x, axes)
            # Two passes: E[x^2] - E[x]^2 cancels when the mean is large against the spread.
            var = jnp.mean(jnp.square(x - mean), axes)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        gain = jax.lax.rsqrt(var + self.epsilon) * scale
        return ((x - mean) * gain + bias).astype(self.dtype)
