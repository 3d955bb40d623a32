"""Semantic-guided feature enhancement (SGFE): low-rank bilinear attention of labels on positions.

Source: CLSL, arXiv 2510.10055; attention after SSGRL, arXiv 1908.07325.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.encoder import TORCH_LINEAR_INIT


@jax.custom_vjp
def bilinear_attention(visual: jax.Array, semantic: jax.Array, direction: jax.Array) -> jax.Array:
    """logits[b, p, c] = sum_r direction[r] * tanh(visual[b, p, r] * semantic[b, c, r]).

    The tanh of one class at a time is computed, used and thrown away, in the backward pass again,
    so the largest temporary is [B, P, R] and nothing of [B, C, P, R] is ever in memory.

    Args:
      visual: U x, [B, P, R].
      semantic: V v, [B, C, R].
      direction: W_h^T w_t, [R].

    Returns:
      [B, P, C] float32.
    """

    def one_class(_: None, semantic_c: jax.Array) -> tuple[None, jax.Array]:
        cross = jnp.tanh(visual * semantic_c[:, None])
        return None, jnp.matmul(cross, direction, preferred_element_type=jnp.float32)

    logits = jax.lax.scan(one_class, None, jnp.swapaxes(semantic, 0, 1))[1]
    return jnp.moveaxis(logits, 0, -1)


def _attention_forward(visual: jax.Array, semantic: jax.Array, direction: jax.Array) -> Any:
    return bilinear_attention(visual, semantic, direction), (visual, semantic, direction)


def _attention_backward(saved: Any, grad: jax.Array) -> Any:
    visual, semantic, direction = saved

    def one_class(carry: Any, inputs: Any) -> Any:
        visual_grad, direction_grad = carry
        semantic_c, grad_c = inputs
        cross = jnp.tanh(visual * semantic_c[:, None]).astype(jnp.float32)
        slope = (1.0 - cross * cross) * grad_c[..., None]
        visual_grad += slope * semantic_c[:, None]
        direction_grad += jnp.einsum("bpr,bp->r", cross, grad_c)
        return (visual_grad, direction_grad), jnp.sum(slope * visual, 1)

    start = (jnp.zeros(visual.shape, jnp.float32), jnp.zeros(direction.shape, jnp.float32))
    classes = (jnp.swapaxes(semantic, 0, 1), jnp.moveaxis(grad, -1, 0))
    (visual_grad, direction_grad), semantic_grad = jax.lax.scan(one_class, start, classes)
    scale = direction.astype(jnp.float32)
    return (
        (visual_grad * scale).astype(visual.dtype),
        (jnp.swapaxes(semantic_grad, 0, 1) * scale).astype(semantic.dtype),
        direction_grad.astype(direction.dtype),
    )


bilinear_attention.defvjp(_attention_forward, _attention_backward)


class SemanticAttention(nn.Module):
    """a[p, c] = w_t . (W_h tanh(U x_p * V v_c) + b_h) + b_t.

    Nothing non-linear stands between W_h and w_t, so `W_h^T w_t` is formed first: the same
    function and the same gradients of every parameter, without a product of rank x rank at each
    (b, p, c).

    Attributes:
      rank: width of the product; U and V have no bias.
      dtype: compute type; the result is float32.
    """

    rank: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, semantic: jax.Array) -> jax.Array:
        """features [B, P, D], semantic [B, C, S] or [C, S] -> logits [B, P, C] float32."""
        r = self.rank

        def project(name: str) -> nn.Dense:
            return nn.Dense(
                r, use_bias=False, dtype=self.dtype, kernel_init=TORCH_LINEAR_INIT, name=name
            )

        hidden = Affine(r, name="hidden")
        target = Affine(1, name="target")
        (hidden_kernel, hidden_bias), (target_kernel, target_bias) = hidden(r), target(r)
        direction = (hidden_kernel @ target_kernel)[:, 0]
        constant = hidden_bias @ target_kernel[:, 0] + target_bias[0]

        visual = project("visual")(features)
        semantic = project("semantic")(semantic)
        if semantic.ndim == 2:
            semantic = jnp.broadcast_to(semantic, (features.shape[0], *semantic.shape))
        return bilinear_attention(visual, semantic, direction.astype(self.dtype)) + constant


class Affine(nn.Module):
    """The parameters of a linear layer, kernel [I, features] and bias [features], not applied."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Width of the input -> (kernel, bias), float32."""
        kernel = self.param("kernel", TORCH_LINEAR_INIT, (inputs, self.features), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


class FeatureEnhancement(nn.Module):
    """SGFE: attention over classes at each position, then a classifier of each position.

    f_p = sum_c softmax_c(a)[p, c] v_c and s_p = W4 GELU(W3 [f_p ; x_p]); W3 keeps the width.

    Attributes:
      rank: of the attention.
      dropout: rate before the last layer.
      dtype: compute type; softmax and logits are float32.
      starts_at_zero: the last layer's first weights are 0, and with them its logits.
    """

    rank: int = 1024
    dropout: float = 0.5
    dtype: Any = jnp.float32
    starts_at_zero: bool = False

    @nn.compact
    def __call__(
        self, features: jax.Array, semantic: jax.Array, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Position logits s, and what led to them.

        Args:
          features: x, [B, P, D].
          semantic: v, [B, C, S], or [C, S] when the label embeddings themselves stand here.
          train: whether dropout acts.

        Returns:
          (s [B, P, C] float32, {attention_logits [B, P, C], attention [B, P, C] softmax over
          classes, enhanced_features [B, P, S]}).
        """
        c = semantic.shape[-2]
        attention_logits = SemanticAttention(self.rank, self.dtype, name="attention")(
            features, semantic
        )
        attention = jax.nn.softmax(attention_logits, -1)
        mix = "bpc,cs->bps" if semantic.ndim == 2 else "bpc,bcs->bps"
        enhanced = jnp.einsum(mix, attention.astype(self.dtype), semantic.astype(self.dtype))
        joined = jnp.concatenate([enhanced, features.astype(self.dtype)], -1)
        hidden = nn.Dense(
            joined.shape[-1], dtype=self.dtype, kernel_init=TORCH_LINEAR_INIT, name="mlp_hidden"
        )(joined)
        hidden = nn.gelu(hidden, approximate=False)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        # The last product in float32: its results are logits.
        position_logits = nn.Dense(
            c,
            dtype=jnp.float32,
            kernel_init=nn.initializers.zeros if self.starts_at_zero else TORCH_LINEAR_INIT,
            name="mlp_out",
        )(hidden)
        out = {
            "attention_logits": attention_logits,
            "attention": attention,
            "enhanced_features": enhanced,
        }
        return position_logits, out
