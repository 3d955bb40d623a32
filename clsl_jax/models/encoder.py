"""Transformer encoder over the positions of a feature map.

Source: Vaswani et al., arXiv 1706.03762, as torch.nn.TransformerEncoderLayer computes it; positions
as in DETR (arXiv 2005.12872), added to queries and keys only.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

TORCH_LINEAR_INIT = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def sine_positions(height: int, width: int, dim: int) -> jax.Array:
    """2-D sine positions [height, width, dim], float32; the first half of dim tells the row.

    Rows and columns count from 1 and are divided by the last one + 1e-6, times 2 pi. Sine and
    cosine take turns along the channels.

    Raises:
      ValueError: dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine positions need a width that 4 divides, not {dim}.")
    half = dim // 2
    rows = jnp.arange(1, height + 1, dtype=jnp.float32) / (height + 1e-6) * (2 * math.pi)
    columns = jnp.arange(1, width + 1, dtype=jnp.float32) / (width + 1e-6) * (2 * math.pi)
    period = 10000.0 ** (2 * (jnp.arange(half) // 2).astype(jnp.float32) / half)
    even = jnp.arange(half) % 2 == 0

    def waves(steps: jax.Array) -> jax.Array:
        angle = steps[:, None] / period
        return jnp.where(even, jnp.sin(angle), jnp.cos(angle))

    y = jnp.broadcast_to(waves(rows)[:, None], (height, width, half))
    x = jnp.broadcast_to(waves(columns)[None], (height, width, half))
    return jnp.concatenate([y, x], -1)


class SelfAttention(nn.Module):
    """Multi-head self-attention in which the positions enter queries and keys, not values.

    Parameters: in_proj_kernel [D, 3D] (query, key, value), in_proj_bias [3D], out_proj.

    Attributes:
      heads: number of heads; must divide D.
      dropout: rate on the attention weights.
      dtype: compute type; the softmax is float32.
    """

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array | None, *, train: bool) -> jax.Array:
        """x [B, P, D], positions [P, D] or None -> [B, P, D]."""
        b, p, d = x.shape
        if d % self.heads:
            raise ValueError(f"{self.heads} attention heads do not divide the width {d}.")
        kernel = self.param(
            "in_proj_kernel", nn.initializers.xavier_uniform(), (d, 3 * d), jnp.float32
        ).astype(self.dtype)
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * d,), jnp.float32).astype(
            self.dtype
        )
        placed = x if positions is None else x + positions.astype(x.dtype)
        query_key = placed @ kernel[:, : 2 * d] + bias[: 2 * d]
        value = x @ kernel[:, 2 * d :] + bias[2 * d :]

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(b, p, self.heads, d // self.heads)

        query, key, value = split(query_key[..., :d]), split(query_key[..., d:]), split(value)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(d // self.heads), -1).astype(self.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=not train)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(b, p, d)
        return nn.Dense(d, dtype=self.dtype, kernel_init=TORCH_LINEAR_INIT, name="out_proj")(mixed)


class EncoderLayer(nn.Module):
    """Self-attention and an MLP with ReLU, each with a residual and a LayerNorm.

    Attributes:
      heads, mlp: attention heads and hidden width of the MLP.
      dropout: rate on attention weights, MLP hidden units and both residual branches.
      norm_first: normalise before each part (pre-norm) instead of after the sum.
      dtype: compute type; LayerNorm is float32.
    """

    heads: int
    mlp: int
    dropout: float = 0.1
    norm_first: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array | None, train: bool) -> jax.Array:
        """x [B, P, D], positions [P, D] or None -> [B, P, D]."""
        d = x.shape[-1]

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout)(y, deterministic=not train)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=TORCH_LINEAR_INIT, name=name)

        attention = SelfAttention(self.heads, self.dropout, self.dtype, name="self_attn")
        norm1 = layer_norm(self.dtype, "norm1")
        norm2 = layer_norm(self.dtype, "norm2")
        linear1, linear2 = dense(self.mlp, "linear1"), dense(d, "linear2")

        def attend(y: jax.Array) -> jax.Array:
            return drop(attention(y, positions, train=train))

        def transform(y: jax.Array) -> jax.Array:
            return drop(linear2(drop(nn.relu(linear1(y)))))

        if self.norm_first:
            x = x + attend(norm1(x))
            return x + transform(norm2(x))
        x = norm1(x + attend(x))
        return norm2(x + transform(x))


def layer_norm(dtype: Any, name: str) -> Any:
    """LayerNorm in float32 with torch's epsilon, its result cast to `dtype`."""
    norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)
    return lambda x: norm(x).astype(dtype)


class Encoder(nn.Module):
    """A stack of encoder layers; none leaves the features as they are.

    Attributes:
      layers: how many.
      heads, mlp, dropout, norm_first, dtype: as in `EncoderLayer`.
      final_norm: one more LayerNorm at the end (usual with norm_first).
      positions: add 2-D sine positions to queries and keys.
      remat: the backward pass computes the inside of each layer again.
    """

    layers: int = 1
    heads: int = 8
    mlp: int = 2048
    dropout: float = 0.1
    norm_first: bool = False
    final_norm: bool = False
    positions: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """features [B, h, w, D] -> [B, h*w, D], row by row."""
        b, h, w, d = features.shape
        x = features.reshape(b, h * w, d).astype(self.dtype)
        if not self.layers:
            return x
        positions = sine_positions(h, w, d).reshape(h * w, d) if self.positions else None
        layer = nn.remat(EncoderLayer, static_argnums=3) if self.remat else EncoderLayer
        for i in range(self.layers):
            x = layer(
                self.heads,
                self.mlp,
                self.dropout,
                self.norm_first,
                self.dtype,
                name=f"layers_{i}",
            )(x, positions, train)
        return layer_norm(self.dtype, "norm")(x) if self.final_norm else x
