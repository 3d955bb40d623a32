"""Semantic-guided feature enhancement (SGFE): low-rank bilinear attention of labels on positions.

Source: CLSL, arXiv 2510.10055; attention after SSGRL, arXiv 1908.07325.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.encoder import TORCH_LINEAR_INIT

# Classes whose tanh a GPU computes at once. Over 32, XLA sums by a kernel of another kind, which it
# did not finish compiling in two minutes (docs/performance.md).
AT_ONCE = 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def bilinear_attention(
    visual: jax.Array, semantic: jax.Array, direction: jax.Array, attention_kernel: bool = False
) -> jax.Array:
    """logits[b, p, c] = sum_r direction[r] * tanh(visual[b, p, r] * semantic[b, c, r]).

    The tanh of one class at a time is computed, used and thrown away, in the backward pass again,
    so the largest temporary is [B, P, R] and nothing of [B, C, P, R] is ever in memory. On a CUDA
    GPU, where that is bound by memory, blocks of up to `AT_ONCE` classes are computed at once, and
    not one tanh is in memory: XLA sums in the kernels that compute it.

    Args:
      visual: U x, [B, P, R].
      semantic: V v, [B, C, R].
      direction: W_h^T w_t, [R].
      attention_kernel: on a CUDA GPU, by the kernels of `models/attention_kernel.py`, for which
        the arrays are bfloat16 (`config.attention_kernel_misfits`); not under `jax.vmap`.

    Returns:
      [B, P, C] float32.
    """
    on_cuda, _ = _on_cuda(attention_kernel)
    return jax.lax.platform_dependent(
        visual, semantic, direction, default=class_by_class_logits, cuda=on_cuda
    )


def _on_cuda(attention_kernel: bool) -> tuple[Callable, Callable]:
    """What computes logits and gradients on a CUDA GPU."""
    if not attention_kernel:
        return in_blocks_logits, in_blocks_gradients
    from clsl_jax.models import attention_kernel as kernels  # Pallas takes its time to import

    return kernels.logits, kernels.gradients


def class_by_class_logits(
    visual: jax.Array, semantic: jax.Array, direction: jax.Array
) -> jax.Array:
    """`bilinear_attention` for any backend, without a gradient."""

    def one_class(_: None, semantic_c: jax.Array) -> tuple[None, jax.Array]:
        cross = jnp.tanh(visual * semantic_c[:, None])
        return None, jnp.matmul(cross, direction, preferred_element_type=jnp.float32)

    logits = jax.lax.scan(one_class, None, jnp.swapaxes(semantic, 0, 1))[1]
    return jnp.moveaxis(logits, 0, -1)


def _attention_forward(
    visual: jax.Array, semantic: jax.Array, direction: jax.Array, attention_kernel: bool
) -> Any:
    saved = visual, semantic, direction
    return bilinear_attention(*saved, attention_kernel), saved


def _attention_backward(attention_kernel: bool, saved: Any, grad: jax.Array) -> Any:
    _, on_cuda = _on_cuda(attention_kernel)
    gradients = jax.lax.platform_dependent(
        *saved, grad, default=class_by_class_gradients, cuda=on_cuda
    )
    return tuple(
        gradient.astype(array.dtype) for gradient, array in zip(gradients, saved, strict=True)
    )


def class_by_class_gradients(
    visual: jax.Array, semantic: jax.Array, direction: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `class_by_class_logits`, float32; `grad` is that of the logits, [B, P, C]."""

    def one_class(carry: Any, inputs: Any) -> Any:
        visual_grad, direction_grad = carry
        semantic_c, grad_c = inputs
        cross = jnp.tanh(visual * semantic_c[:, None]).astype(jnp.float32)
        slope = (1.0 - cross * cross) * grad_c[..., None]
        visual_grad += slope * semantic_c[:, None]
        direction_grad += jnp.einsum("bpr,bp->br", cross, grad_c)
        return (visual_grad, direction_grad), jnp.sum(slope * visual, 1)

    start = _no_gradients(visual)
    classes = (jnp.swapaxes(semantic, 0, 1), jnp.moveaxis(grad, -1, 0))
    (visual_grad, direction_grad), semantic_grad = jax.lax.scan(one_class, start, classes)
    scale = direction.astype(jnp.float32)
    return visual_grad * scale, jnp.swapaxes(semantic_grad, 0, 1) * scale, direction_grad.sum(0)


def _no_gradients(visual: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What gradients of visual [B, P, R] and direction [B, R] are added to.

    The latter an example at a time: a sum over examples within the loop would be an exchange
    between devices for each of its turns.
    """
    b, _, r = visual.shape
    return jnp.zeros(visual.shape, jnp.float32), jnp.zeros((b, r), jnp.float32)


def in_blocks_logits(visual: jax.Array, semantic: jax.Array, direction: jax.Array) -> jax.Array:
    """`bilinear_attention` for a GPU, without a gradient: up to `AT_ONCE` classes at once."""

    def one_block(semantic_k: jax.Array) -> jax.Array:
        cross = _tanh_of_products(visual, semantic_k)
        return jnp.sum(cross * direction.astype(jnp.float32), -1)

    return jnp.swapaxes(_joined(jax.lax.map(one_block, _blocks(semantic)), semantic.shape[1]), 1, 2)


def in_blocks_gradients(
    visual: jax.Array, semantic: jax.Array, direction: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `in_blocks_logits`, float32; `grad` is that of the logits, [B, P, C]."""

    wide = visual.astype(jnp.float32)

    def one_block(carry: Any, inputs: Any) -> Any:
        # Each sum has a barrier before it, or XLA keeps the tanh from one for the next.
        arrays = wide, *inputs
        wide_visual, semantic_k, slope = jax.lax.optimization_barrier(arrays)
        cross, slope = _tanh_of_products(wide_visual, semantic_k), slope[..., None]
        sums = jax.lax.reduce(
            ((1.0 - cross * cross) * slope * semantic_k[:, :, None], cross * slope),
            (0.0, 0.0),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            (1,),
        )
        (visual_grad, products), arrays = jax.lax.optimization_barrier((sums, arrays))
        wide_visual, semantic_k, slope = arrays
        cross = _tanh_of_products(wide_visual, semantic_k)
        semantic_grad = jnp.sum((1.0 - cross * cross) * slope[..., None] * wide_visual[:, None], 2)
        return (carry[0] + visual_grad, carry[1] + jnp.sum(products, 1)), semantic_grad

    start = _no_gradients(visual)
    classes = (_blocks(semantic.astype(jnp.float32)), _blocks(jnp.swapaxes(grad, 1, 2)))
    (visual_grad, direction_grad), semantic_grad = jax.lax.scan(one_block, start, classes)
    scale = direction.astype(jnp.float32)
    return (
        visual_grad * scale,
        _joined(semantic_grad, semantic.shape[1]) * scale,
        direction_grad.sum(0),
    )


def _blocks(x: jax.Array) -> jax.Array:
    """[B, C, ...] in the fewest blocks of up to `AT_ONCE` classes, [n, B, K, ...], zeros behind."""
    c = x.shape[1]
    n = math.ceil(c / AT_ONCE)
    k = math.ceil(c / n)
    padded = jnp.pad(x, [(0, n * k - c if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(padded.reshape(x.shape[0], n, k, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array, classes: int) -> jax.Array:
    """The inverse of `_blocks`: [B, C, ...]."""
    n, b, k, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(b, n * k, *rest)[:, :classes]


def _tanh_of_products(visual: jax.Array, semantic: jax.Array) -> jax.Array:
    """tanh(visual * semantic) of [B, P, R] and [B, C, R]: [B, C, P, R], float32.

    By an exponential, to an absolute error of 1e-7: XLA thinks `jnp.tanh` too dear to compute it in
    the kernels that sum, and keeps it in memory.
    """
    product = visual[:, None].astype(jnp.float32) * semantic[:, :, None].astype(jnp.float32)
    return 1.0 - 2.0 / (jnp.exp(2.0 * product) + 1.0)


bilinear_attention.defvjp(_attention_forward, _attention_backward)


class SemanticAttention(nn.Module):
    """a[p, c] = w_t . (W_h tanh(U x_p * V v_c) + b_h) + b_t.

    Nothing non-linear stands between W_h and w_t, so `W_h^T w_t` is formed first: the same
    function and the same gradients of every parameter, without a product of rank x rank at each
    (b, p, c).

    Attributes:
      rank: width of the product; U and V have no bias.
      dtype: compute type; the result is float32.
      attention_kernel: see `bilinear_attention`.
    """

    rank: int = 1024
    dtype: Any = jnp.float32
    attention_kernel: bool = False

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
        direction = direction.astype(self.dtype)
        return bilinear_attention(visual, semantic, direction, self.attention_kernel) + constant


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

    Its halves are applied apart, W3 [f_p ; x_p] = F f_p + X x_p, and F to the v_c before their sum
    where that is fewer rows than positions: the same function of the same parameters by fewer
    products, and none for a gradient of frozen features.

    Attributes:
      rank: of the attention.
      dropout: rate before the last layer.
      dtype: compute type; softmax and logits are float32.
      starts_at_zero: the last layer's first weights are 0, and with them its logits.
      attention_kernel: see `bilinear_attention`.
    """

    rank: int = 1024
    dropout: float = 0.5
    dtype: Any = jnp.float32
    starts_at_zero: bool = False
    attention_kernel: bool = False

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
        c, s = semantic.shape[-2:]
        few = semantic.ndim == 2 or c < features.shape[-2]
        width = s + features.shape[-1]
        attention_logits = SemanticAttention(
            self.rank, self.dtype, self.attention_kernel, name="attention"
        )(features, semantic)
        attention = jax.nn.softmax(attention_logits, -1)

        def mixed(values: jax.Array) -> jax.Array:
            formula = "bpc,cs->bps" if values.ndim == 2 else "bpc,bcs->bps"
            return jnp.einsum(formula, attention.astype(self.dtype), values)

        semantic = semantic.astype(self.dtype)
        enhanced = mixed(semantic)
        kernel, bias = (x.astype(self.dtype) for x in Affine(width, name="mlp_hidden")(width))
        hidden = mixed(semantic @ kernel[:s]) if few else enhanced @ kernel[:s]
        hidden += features.astype(self.dtype) @ kernel[s:] + bias
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
