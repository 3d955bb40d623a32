"""Batch normalisation with PyTorch's running statistics, always computed in float32."""

from functools import partial
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

        if not train:
            mean, var = running_mean.value, running_var.value
            return _normalised(x, mean, var, scale, bias, self.epsilon).astype(self.dtype)
        shift = running_mean.value
        y, mean, var = normalize_batch(x, scale, bias, shift, self.epsilon, self.dtype)
        if not self.is_initializing():
            count = x.size // d
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value += self.momentum * (mean - running_mean.value)
            running_var.value += self.momentum * (unbiased - running_var.value)
        return y


def _normalised(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    gain = jax.lax.rsqrt(var + epsilon) * scale
    return (x.astype(jnp.float32) - mean) * gain + bias


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalize_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the batch's own statistics, with the gradient in closed form.

    That gradient reads x and the result's gradient twice and keeps x alone, as it came; what
    differentiation makes of the formula keeps float32 copies and sums over the batch once more.

    Args:
      x: [..., D].
      scale, bias: float32 [D].
      shift: float32 [D], about the mean, as the running mean is; see `one_pass`. No result
        depends on it but by rounding, and it has no gradient.
      epsilon: added to the variance.
      dtype: of the result.

    Returns:
      The result [..., D], mean and biased variance, float32 [D]. The latter two carry no gradient.

    Source: Ioffe and Szegedy, arXiv 1502.03167, section 3.
    """
    return _forward(x, scale, bias, shift, epsilon, dtype)[0]


def one_pass(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance by one reading of x, where memory is what bounds.

    E[x^2] - E[x]^2 cancels when the mean is large against the spread; so much the less, the nearer
    `shift`, which is taken off first, is to the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    axes = tuple(range(x.ndim - 1))
    moved = x.astype(jnp.float32) - shift
    first, second = jnp.mean(moved, axes), jnp.mean(jnp.square(moved), axes)
    return shift + first, jnp.maximum(second - jnp.square(first), 0.0)


def two_passes(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, whatever the mean; `shift` is not needed."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes)
    return mean, jnp.mean(jnp.square(wide - mean), axes)


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float, dtype: Any
) -> Any:
    mean, var = jax.lax.platform_dependent(x, shift, cpu=two_passes, default=one_pass)
    y = _normalised(x, mean, var, scale, bias, epsilon).astype(dtype)
    return (y, mean, var), (x, scale, mean, var)


def _backward(epsilon: float, dtype: Any, saved: Any, grads: Any) -> Any:
    x, scale, mean, var = saved
    grad = grads[0].astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    inverse = jax.lax.rsqrt(var + epsilon)
    centred = x.astype(jnp.float32) - mean
    bias_grad = jnp.sum(grad, axes)
    scale_grad = jnp.sum(grad * centred, axes) * inverse
    slope = scale_grad * inverse / count
    x_grad = (grad - bias_grad / count - centred * slope) * (scale * inverse)
    return x_grad.astype(x.dtype), scale_grad, bias_grad, jnp.zeros_like(scale)


normalize_batch.defvjp(_forward, _backward)
