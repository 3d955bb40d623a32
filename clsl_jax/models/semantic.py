"""Semantic-related feature learning (SRFL): one feature vector per class and image.

Source: CLSL, arXiv 2510.10055.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.alignment import Affine
from clsl_jax.models.encoder import TORCH_LINEAR_INIT
from clsl_jax.models.norm import BatchNorm


class SemanticFeatures(nn.Module):
    """v_c = W2 GELU(BN(W1 [e_c ; g])), with g the mean of x over positions.

    W1 keeps the width E + D, W2 gives D. BN runs over B * C; GELU is the exact one (erf).

    W1's halves are applied apart, W1 [e_c ; g] = E e_c + G g, before the pairs are formed: to C + B
    rows instead of B * C, the same function of the same parameters.

    Attributes:
      dtype: compute type; BN is float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, embeddings: jax.Array, *, train: bool) -> jax.Array:
        """features [B, P, D], embeddings [C, E] -> [B, C, D]."""
        d, e = features.shape[-1], embeddings.shape[-1]
        mean = jnp.mean(features.astype(jnp.float32), 1)
        kernel, bias = (x.astype(self.dtype) for x in Affine(e + d, name="hidden")(e + d))
        of_class = embeddings.astype(self.dtype) @ kernel[:e] + bias
        of_image = mean.astype(self.dtype) @ kernel[e:]
        hidden = of_class[None] + of_image[:, None]
        hidden = BatchNorm(dtype=self.dtype, name="norm")(hidden, train=train)
        hidden = nn.gelu(hidden, approximate=False)
        return nn.Dense(d, dtype=self.dtype, kernel_init=TORCH_LINEAR_INIT, name="out")(hidden)
