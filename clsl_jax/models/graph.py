"""Label correlation: co-occurrence of labels, and graph convolution over their embeddings.

Source: Chen et al., ML-GCN, arXiv 1904.03582.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.encoder import TORCH_LINEAR_INIT


def cooccurrence(
    labels: jax.Array, weight: jax.Array | None = None, given: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """How often two classes are positive in one image, among entries that are known together.

    Args:
      labels: [N, C]; annotations (1 positive, 0 negative, -1 unknown) or recovered labels in
        [0, 1].
      weight: [N, C], how far each entry is to be trusted, 0 for an unknown one; None trusts all
        that are not below 0.
      given: bool [N, C], entries that may be the first of a pair; None allows all. Labels between
        0 and 1 must not: the many that are hardly positive would together outweigh the few that
        are, and all conditional frequencies become the unconditional one.

    Returns:
      (pairs, counts), float32 [C, C] each: `pairs[a, b]` counts the images that are positive for a
      and for b, with diagonal 0, `counts[a, b]` those positive for a in which b is known. An image
      weighs the product of the two entries' weights.
    """
    labels = jnp.asarray(labels).astype(jnp.float32)
    weight = (labels >= 0 if weight is None else weight).astype(jnp.float32)
    positive = jnp.clip(labels, 0.0, 1.0) * weight
    first = positive if given is None else jnp.where(given, positive, 0.0)
    product = functools.partial(jnp.matmul, first.T, precision=jax.lax.Precision.HIGHEST)
    off_diagonal = 1.0 - jnp.eye(labels.shape[1], dtype=jnp.float32)
    return product(positive) * off_diagonal, product(weight)


def reweighted_adjacency(
    pairs: jax.Array, counts: jax.Array, threshold: float = 0.4, smoothing: float = 0.25
) -> jax.Array:
    """Binarised and re-weighted correlation with self loops, [C, C] (ML-GCN eq. 7 and 8).

    Row c holds the frequency of each class among the images positive for c in which it is known; it
    becomes 1 from `threshold` on, else 0. Each column is then scaled to sum to `smoothing`, and the
    identity added.

    Args:
      pairs, counts: [C, C] each, as `cooccurrence` gives them. A class without a positive has no
        neighbours.
      threshold: the least conditional frequency that makes an edge.
      smoothing: weight of all neighbours together, the class itself having 1.
    """
    pairs, counts = jnp.asarray(pairs, jnp.float32), jnp.asarray(counts, jnp.float32)
    c = pairs.shape[0]
    # Compared without the division, so that a pair never known together cannot give 0 / 0, and a
    # frequency of exactly the threshold does not depend on rounding.
    edges = ((counts > 0) & (pairs >= threshold * counts)).astype(jnp.float32)
    edges = edges * (1.0 - jnp.eye(c, dtype=jnp.float32))
    return edges * smoothing / (jnp.sum(edges, 0, keepdims=True) + 1e-6) + jnp.eye(c)


def normalized_adjacency(
    pairs: jax.Array, counts: jax.Array, threshold: float = 0.4, smoothing: float = 0.25
) -> jax.Array:
    """D^-1/2 A^T D^-1/2 [C, C] of the re-weighted A, D being its row sums (never below 1).

    Args: as in `reweighted_adjacency`. Pure and free of Python branches on values, so that it can
    be compiled and refreshed every epoch.
    """
    weights = reweighted_adjacency(pairs, counts, threshold, smoothing)
    scale = jax.lax.rsqrt(jnp.sum(weights, 1))
    return scale[:, None] * weights.T * scale[None, :]


class LabelGraph(nn.Module):
    """Graph convolution over the labels, as a correction to their embeddings.

    H_0 = e; H_{l+1} = LeakyReLU(A H_l W_l), slope 0.2, without the activation on the last layer
    and without bias, both as in ML-GCN; the result is e + H_L. ML-GCN makes classifiers of H_L and
    so needs no sum; here the next stage expects label embeddings, and the sum keeps what tells one
    class from another however much the adjacency mixes them.

    Attributes:
      layers: how many; 0 gives the embeddings back and creates no parameters.
      dtype: compute type.
    """

    layers: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embeddings: jax.Array, adjacency: jax.Array | None) -> jax.Array:
        """embeddings [C, E], adjacency [C, C] -> [C, E].

        Raises:
          ValueError: there are layers but no adjacency.
        """
        if not self.layers:
            return embeddings
        if adjacency is None:
            raise ValueError(
                f"graph_layers is {self.layers} but no adjacency was given; pass the [C, C] result "
                "of normalized_adjacency, or set graph_layers to 0."
            )
        e = embeddings.shape[-1]
        nodes = embeddings.astype(self.dtype)
        adjacency = adjacency.astype(self.dtype)
        for i in range(self.layers):
            if i > 0:
                nodes = nn.leaky_relu(nodes, 0.2)
            kernel = nn.Dense(
                e,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=TORCH_LINEAR_INIT,
                name=f"layer_{i}",
            )
            nodes = adjacency @ kernel(nodes)
        return embeddings + nodes.astype(embeddings.dtype)


def label_adjacency(
    targets: jax.Array,
    weights: jax.Array,
    threshold: float,
    smoothing: float,
    given: jax.Array | None = None,
) -> jax.Array:
    """Returns the normalised label graph [C, C] of the labels at hand.

    Args:
      targets: [N, C] in [0, 1].
      weights: [N, C] in [0, 1]; entries of weight 0 are unknown and do not count.
      threshold: conditional frequency from which two labels are connected, among entries that are
        known together: with few of these, chance connects labels too.
      smoothing: sum of the weights of a label's neighbours.
      given: bool [N, C], as in `cooccurrence`.
    """
    pairs, counts = cooccurrence(targets, weights, given)
    return normalized_adjacency(pairs, counts, threshold=threshold, smoothing=smoothing)
