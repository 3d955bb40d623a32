"""BERT's encoder (Devlin et al., arXiv 1810.04805) as a pure function of its published weights."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clsl_jax.errors import InputError

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_ROWS_AT_ONCE = 128


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor that a forward pass reads.

    Args:
      config: a Hugging Face `config.json` of model type `bert`.

    Raises:
      InputError: a key is missing or the architecture is another one.
    """
    kind = config.get("model_type", "bert")
    if kind != "bert":
        raise InputError(f"config.json: model_type is {kind!r}, only 'bert' can be read.")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise InputError(f"config.json: position_embedding_type is {positions!r}, not 'absolute'.")
    if config.get("hidden_act", "gelu") not in tuple(_ACTIVATIONS):  # a list would be no key
        raise InputError(
            f"config.json: hidden_act is {config['hidden_act']!r}, expected one of "
            f"{', '.join(_ACTIVATIONS)}."
        )
    sizes = {key: config.get(key) for key in _LARGEST}
    wrong = [
        f"{key} is {sizes[key]!r}, expected a whole number from 1 to {largest:,}"
        for key, largest in _LARGEST.items()
        if type(sizes[key]) is not int or not 0 < sizes[key] <= largest
    ]
    if wrong:
        raise InputError(f"config.json: {'; '.join(wrong)}.")
    eps = config.get("layer_norm_eps", _LAYER_NORM_EPS)
    if type(eps) is not float or not 0 < eps < 1:
        raise InputError(f"config.json: layer_norm_eps is {eps!r}, expected a number from 0 to 1.")
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    if d % sizes["num_attention_heads"]:
        raise InputError("config.json: hidden_size is not a multiple of num_attention_heads.")
    shapes = {
        "embeddings.word_embeddings.weight": (sizes["vocab_size"], d),
        "embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (sizes["type_vocab_size"], d),
        **_norm_shapes("embeddings.LayerNorm", d),
    }
    for i in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= _dense_shapes(f"{layer}.attention.self.{name}", d, d)
        shapes |= _dense_shapes(f"{layer}.attention.output.dense", d, d)
        shapes |= _norm_shapes(f"{layer}.attention.output.LayerNorm", d)
        shapes |= _dense_shapes(f"{layer}.intermediate.dense", d, f)
        shapes |= _dense_shapes(f"{layer}.output.dense", f, d)
        shapes |= _norm_shapes(f"{layer}.output.LayerNorm", d)
    return shapes


# What a size may be at most: far beyond any BERT, and small enough to be told from nonsense.
_LARGEST = {
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "num_hidden_layers": 1000,
    "num_attention_heads": 10**6,
    "intermediate_size": 10**6,
    "max_position_embeddings": 10**6,
    "type_vocab_size": 10**6,
}
_LAYER_NORM_EPS = 1e-12


def _dense_shapes(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def hidden_states(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    token_ids: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    """Returns the last layer's hidden states, float32 [C, T, D].

    Computed in float32 at full precision on any device, so that an embedding does not depend on
    where it was made. Rows are independent, and padding changes nothing.

    Args:
      weights: float32 tensors by the names of `tensor_shapes`, dense layers as [outputs, inputs].
      config: of the same folder.
      token_ids: int [C, T], padded on the right.
      mask: bool [C, T], True at tokens, False at padding.
    """
    count = len(token_ids)
    padding = -count % min(count, _ROWS_AT_ONCE)
    # Full chunks only: one shape, one compilation.
    token_ids = np.pad(token_ids, ((0, padding), (0, 0)))
    mask = np.pad(mask, ((0, padding), (0, 0)), mode="edge")
    step = min(count, _ROWS_AT_ONCE)
    chunks = [
        _forward(weights, config, token_ids[i : i + step], mask[i : i + step])
        for i in range(0, len(token_ids), step)
    ]
    return np.concatenate(chunks)[:count]


def _forward(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    token_ids: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    eps = float(config.get("layer_norm_eps", _LAYER_NORM_EPS))
    table = weights["embeddings.word_embeddings.weight"]
    # Gathered on the host: the table is the largest tensor, and few of its rows are read.
    summed = (
        table[token_ids]
        + weights["embeddings.position_embeddings.weight"][: token_ids.shape[1]]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    norm = {name: weights[f"embeddings.LayerNorm.{name}"] for name in ("weight", "bias")}
    hidden = _layer_norm(jnp.asarray(summed), norm["weight"], norm["bias"], eps)
    for i in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{i}."
        layer = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        hidden = _layer(
            layer,
            hidden,
            mask,
            heads=config["num_attention_heads"],
            activation=config.get("hidden_act", "gelu"),
            eps=eps,
        )
    return np.asarray(hidden)


@functools.partial(jax.jit, static_argnames=("heads", "activation", "eps"))
def _layer(
    weights: Mapping[str, jax.Array],
    hidden: jax.Array,
    mask: jax.Array,
    *,
    heads: int,
    activation: str,
    eps: float,
) -> jax.Array:
    """One post-norm transformer layer, [C, T, D] -> [C, T, D]."""
    c, t, d = hidden.shape

    def dense(name: str, x: jax.Array) -> jax.Array:
        return _matmul("...i,oi->...o", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        return _layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    query, key, value = (
        dense(f"attention.self.{name}", hidden).reshape(c, t, heads, d // heads)
        for name in ("query", "key", "value")
    )
    logits = _matmul("cqhd,ckhd->chqk", query, key) / np.sqrt(d // heads)
    logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    attended = _matmul("chqk,ckhd->cqhd", jax.nn.softmax(logits, axis=-1), value).reshape(c, t, d)
    hidden = norm("attention.output.LayerNorm", hidden + dense("attention.output.dense", attended))
    inner = _ACTIVATIONS[activation](dense("intermediate.dense", hidden))
    return norm("output.LayerNorm", hidden + dense("output.dense", inner))


def _matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Without this, GPUs and TPUs multiply float32 in fewer bits.
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + eps) * scale + bias
