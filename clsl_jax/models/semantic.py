"""Semantic-related feature learning (SRFL): one feature vector per class and image.

Source: CLSL, arXiv 2510.10055.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.encoder import TORCH_LINEAR_INIT
from clsl_jax.models.norm import BatchNorm


class SplitDense(nn.Module):
    """A linear layer on [a ; b] for a [C, I] and b [B, J], all pairs of rows.

    W [a ; b] = W_a a + W_b b, so the product is taken before the pairs are formed: C + B rows
    instead of B * C, the same function and the same parameters (kernel [I + J, O], bias [O]).
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a [C, I], b [B, J] -> [B, C, features]."""
        i, j = a.shape[-1], b.shape[-1]
        kernel = self.param("kernel", TORCH_LINEAR_INIT, (i + j, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        first = a.astype(self.dtype) @ kernel[:i] + bias
        second = b.astype(self.dtype) @ kernel[i:]
        return first[None] + second[:, None]


class SemanticFeatures(nn.Module):
    """v_c = W2 GELU(BN(W1 [e_c ; g])), with g the mean of x over positions.

    W1 keeps the width E + D, W2 gives D. BN runs over B * C; GELU is the exact one (erf).

    Attributes:
      dtype: compute type; BN is float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, embeddings: jax.Array, *, train: bool) -> jax.Array:
        """features [B, P, D], embeddings [C, E] -> [B, C, D]."""
        d, e = features.shape[-1], embeddings.shape[-1]
        mean = jnp.mean(features.astype(jnp.float32), 1)
        hidden = SplitDense(e + d, self.dtype, name="hidden")(embeddings, mean)
        hidden = BatchNorm(dtype=self.dtype, name="norm")(hidden, train=train)
        hidden = nn.gelu(hidden, approximate=False)
        return nn.Dense(d, dtype=self.dtype, kernel_init=TORCH_LINEAR_INIT, name="out")(hidden)
