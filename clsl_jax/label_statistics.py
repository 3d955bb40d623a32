"""What known labels say of unknown ones: label statistics, alone and with the image's evidence.

Pure functions of whole matrices, [N, C] with N training images and C classes; annotations are 1
positive, 0 negative, -1 unknown. Arrays with N rows may be sharded by row.

The model is a mixture of K kinds of images, within each of which labels are independent (a mixture
of Bernoulli distributions). It is fitted to the known cells by expectation maximisation, once. An
unknown label's probability is its posterior given the image's known labels and, if there are any,
the scores of a network, which enter as likelihood ratios: what the network says of a label beyond
how frequent it is. A network's scores have no part in the fit: with them, the components model the
network's mistakes as well, and its posteriors were worse than the scores alone
(docs/study-details.md).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clsl_jax.models.graph import cooccurrence

_LARGEST_LOG_RATIO = 12.0
_ITERATIONS = 100  # of expectation and maximisation
# Of products: a TPU would take bfloat16 for float32, a GPU TensorFloat-32.
_WHOLE = jax.lax.Precision.HIGHEST


class Mixture(NamedTuple):
    """A mixture of Bernoulli distributions.

    Attributes:
      log_prior: float32 [K], of the components; their exponentials sum to 1.
      logits: float32 [K, C], log odds of each label in each component.
    """

    log_prior: jax.Array
    logits: jax.Array


def _log_odds(probabilities: jax.Array) -> jax.Array:
    return jnp.log(probabilities) - jnp.log1p(-probabilities)


def _mixture_of(statistics: Mapping[str, jax.Array]) -> Mixture:
    """The mixture of what `fit_statistics` keeps."""
    return Mixture(statistics["mixture_prior"], statistics["mixture_logits"])


def label_frequencies(annotations: jax.Array) -> jax.Array:
    """Share of positives among the known labels of each class, and one of each kind besides.

    Args:
      annotations: [N, C].

    Returns:
      float32 [C], strictly between 0 and 1.
    """
    positives = jnp.sum(annotations == 1, axis=0, dtype=jnp.float32)
    known = jnp.sum(annotations >= 0, axis=0, dtype=jnp.float32)
    return (positives + 1.0) / (known + 2.0)


def co_occurrence_scores(annotations: jax.Array) -> jax.Array:
    """The mean frequency of each class given one of the image's other known positives.

    Of class c in an image whose known positives are J: ``mean of P(c | j) over j in J, j != c``.
    Frequencies are among cells known together, drawn by one pseudo-count towards the class's own.

    Args:
      annotations: [N, C].

    Returns:
      float32 [N, C], of a known label as if it were unknown and had not been counted, so that
      thresholds can be calibrated on these; a class's own frequency where an image has no other
      known positive.

    Source: the within-image part of Chen et al., Structured Semantic Transfer for Multi-Label
    Recognition with Partial Labels, arXiv 2112.10941, with frequencies among known
    labels in the place of the co-occurrence that the paper's network learns.
    """
    frequencies = label_frequencies(annotations)
    positive = annotations == 1
    known = (annotations >= 0).astype(jnp.float32)
    both, asked = cooccurrence(annotations)
    others = jnp.sum(positive, axis=1, keepdims=True) - positive

    def add(total: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, present, both, asked = given
        # Of a known cell, without what it has added to the counts itself.
        conditional = (both - positive + frequencies) / (asked - known + 1.0)
        counts = present[:, None] & (jnp.arange(len(both)) != number)
        return total + jnp.where(counts, conditional, 0.0), None

    start = jnp.zeros(annotations.shape, jnp.float32)
    classes = jnp.arange(annotations.shape[1])
    total, _ = jax.lax.scan(add, start, (classes, positive.T, both, asked))
    return jnp.where(others > 0, total / jnp.maximum(others, 1), frequencies)


def init_mixture(key: jax.Array, annotations: jax.Array, components: int) -> Mixture:
    """Returns equally likely components around the classes' frequencies, drawn apart by `key`.

    Args:
      key: of the draw.
      annotations: [N, C].
      components: K.
    """
    frequencies = label_frequencies(annotations)
    base = _log_odds(frequencies)
    apart = jax.random.normal(key, (components, annotations.shape[1]))
    return Mixture(jnp.full(components, -jnp.log(float(components))), base + apart)


def evidence(scores: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Log likelihood ratios of a label's presence that a network's probabilities stand for.

    ``logit(score) - logit(frequency)``: a network that says what is true of the class at large
    gives no evidence. Not bounded but by float32, so that sure scores keep their order.

    Args:
      scores: [N, C], calibrated probabilities.
      frequencies: [C].

    Returns:
      float32 [N, C].
    """
    score = jnp.clip(scores.astype(jnp.float32), 1e-30, 1.0 - 2.0**-24)
    return _log_odds(score) - _log_odds(frequencies)


def mixture_posterior(
    mixture: Mixture, annotations: jax.Array, log_ratios: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Probability of each label given the image's other known ones and its evidence.

    Args:
      mixture: fitted.
      annotations: [N, C].
      log_ratios: [N, C] from `evidence`; None for none. That of a known label speaks for that label
        alone.

    Returns:
      probabilities [N, C], of a known label as if it were unknown, but that the mixture was fitted
      with it: thresholds calibrated on known labels flatter a mixture of few. And the components'
      posterior [N, K].
    """
    ratios = jnp.zeros(annotations.shape) if log_ratios is None else log_ratios
    log_odds, responsibilities = _others_log_odds(mixture, annotations, ratios)
    return jax.nn.sigmoid(log_odds + ratios), responsibilities


def _others_log_odds(
    mixture: Mixture, annotations: jax.Array, ratios: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log odds [N, C] of each label without its own evidence; the components' posterior [N, K].

    Of one label at most 12 is heard for others, or one sure mistake would say what the image is.
    """
    ratios = jnp.clip(ratios, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    log_on, log_off = jax.nn.log_sigmoid(mixture.logits), jax.nn.log_sigmoid(-mixture.logits)

    def said(on: jax.Array, off: jax.Array) -> jax.Array:
        """Log likelihood [N, C] of what is known or seen of each label in one component."""
        unknown = jnp.logaddexp(on + ratios, off)
        return jnp.where(annotations < 0, unknown, jnp.where(annotations == 1, on, off))

    joint = jax.lax.map(lambda part: jnp.sum(said(*part), axis=1), (log_on, log_off)).T
    joint += mixture.log_prior
    responsibilities = jax.nn.softmax(joint, axis=1)

    def add(totals: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> Any:
        share, on, off = part
        # Without the label's own part in the component's share.
        others = jnp.maximum(share[:, None], 1e-30) * jnp.exp(-said(on, off))
        present, absent = totals
        return (present + others * jnp.exp(on), absent + others * jnp.exp(off)), None

    start = jnp.zeros(annotations.shape, jnp.float32)
    (present, absent), _ = jax.lax.scan(add, (start, start), (responsibilities.T, log_on, log_off))
    return jnp.log(present) - jnp.log(absent), responsibilities


def fit_mixture(
    mixture: Mixture, annotations: jax.Array, *, iterations: int, prior: jax.Array | float = 5.0
) -> Mixture:
    """Improves a mixture by expectation maximisation; unknown cells say nothing.

    Args:
      mixture: to start from.
      annotations: [N, C]; rows without a known label say nothing.
      iterations: of expectation and maximisation.
      prior: pseudo-counts by which each component's frequencies are drawn towards the classes'.

    Returns:
      The mixture, no less likely a posteriori than the one given.
    """
    frequencies = label_frequencies(annotations)
    positive = (annotations == 1).astype(jnp.float32)
    known = (annotations >= 0).astype(jnp.float32)
    counted = known.any(axis=1).astype(jnp.float32)[:, None]
    rows = jnp.sum(counted)
    product = functools.partial(jnp.matmul, precision=_WHOLE)

    def improve(mixture: Mixture, _: None) -> tuple[Mixture, None]:
        _, shares = mixture_posterior(mixture, annotations)
        shares = shares * counted
        on = product(shares.T, positive) + prior * frequencies
        off = product(shares.T, known) + prior - on
        weight = (jnp.sum(shares, axis=0) + 1.0) / (rows + len(mixture.log_prior))
        return Mixture(jnp.log(weight), jnp.log(on) - jnp.log(jnp.maximum(off, 1e-6))), None

    return jax.lax.scan(improve, mixture, None, length=iterations)[0]


def fit_statistics(key: jax.Array, annotations: jax.Array, components: int) -> dict[str, jax.Array]:
    """Returns all that is kept of the known labels: frequencies and a mixture, as plain arrays.

    The mixture's prior is a tenth of the known cells that a component has of a class, from 1 to 5:
    of the priors tried on `scenes`, 2 was best at 10 % known and 5 from 20 % on.

    Args:
      key: of the components' start.
      annotations: [N, C].
      components: K.

    Returns:
      {"frequencies": [C], "mixture_prior": [K], "mixture_logits": [K, C]}, float32.
    """
    start = init_mixture(key, annotations, components)
    known = jnp.mean(jnp.sum(annotations >= 0, axis=0, dtype=jnp.float32))
    prior = jnp.clip(0.1 * known / components, 1.0, 5.0)
    mixture = fit_mixture(start, annotations, iterations=_ITERATIONS, prior=prior)
    return {
        "frequencies": label_frequencies(annotations),
        "mixture_prior": mixture.log_prior,
        "mixture_logits": mixture.logits,
    }


def informed_probabilities(
    statistics: Mapping[str, jax.Array],
    annotations: jax.Array,
    scores: jax.Array | None = None,
) -> jax.Array:
    """Probability of each unknown label given the image's known labels and a network's scores.

    Args:
      statistics: from `fit_statistics`.
      annotations: [N, C].
      scores: [N, C], calibrated probabilities; a class's frequency says nothing. None for none.

    Returns:
      float32 [N, C].
    """
    ratios = None if scores is None else evidence(scores, statistics["frequencies"])
    return mixture_posterior(_mixture_of(statistics), annotations, ratios)[0]


def others_log_ratios(
    statistics: Mapping[str, jax.Array], annotations: jax.Array, scores: jax.Array
) -> jax.Array:
    """What an image's other labels say of each of its labels, beyond how frequent that label is.

    The log odds of a label given the image's other known labels and, for the other unknown ones,
    the network's scores, less the log odds of its frequency. Added to what the network says of the
    label itself it gives `informed_probabilities`.

    Args:
      statistics: from `fit_statistics`.
      annotations: [N, C].
      scores: [N, C], calibrated probabilities.

    Returns:
      float32 [N, C].
    """
    frequencies = statistics["frequencies"]
    ratios = evidence(scores, frequencies)
    log_odds, _ = _others_log_odds(_mixture_of(statistics), annotations, ratios)
    return log_odds - _log_odds(frequencies)
