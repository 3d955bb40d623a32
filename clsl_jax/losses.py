"""Losses for partially labelled images: element-wise terms and their reductions.

The element-wise losses (`asymmetric_loss`, `binary_cross_entropy`, `hill_loss`,
`focal_margin_loss`) never reduce; `clsl_loss` does, at one of three scales:

* ``released``: the scale of the CLSL authors' program. The known term is a *sum* over the known
  entries, the recovered term a *mean* over all entries, both times 1000, and only the global branch
  sees recovered labels.
* ``balanced``: every branch gets the mean over its known entries plus the recovered entries divided
  by the number of *unknown* ones, so that a handful of recovered labels weighs little; or by the
  number of known ones where these are more, so that none weighs more than a known one.
* ``mean``: as ``balanced``, but both are divided by the number of all entries: a known and an
  unknown entry of weight 1 count alike, as in methods that take unknown labels for negatives.

Letters: B batch, C classes.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

ElementwiseLoss = Callable[[jax.Array, jax.Array], jax.Array]

SCALES = ("balanced", "released", "mean")
RELEASED_FACTOR = 1000.0
# From anywhere within 30 of zero, to 1e-5 of the log odds (a test says so).
_NEWTON_STEPS = 6


def asymmetric_loss(
    logits: jax.Array,
    targets: jax.Array,
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 2.0,
    clip: float = 0.0,
    eps: float = 1e-5,
) -> jax.Array:
    """Asymmetric loss, element-wise and unreduced.

    With ``p = sigmoid(logits)``, ``q = min(1 - p + clip, 1)`` and target ``t``::

        -(1 - p_t)^gamma_t * (t log max(p, eps) + (1 - t) log max(q, eps))
        p_t = t p + (1 - t) q,   gamma_t = t gamma_pos + (1 - t) gamma_neg

    The focusing weight ``(1 - p_t)^gamma_t`` carries no gradient. Below ``eps`` the logarithm is
    flat, so an entry wrong by more than ``-log(eps)`` in logits has no gradient either. Logarithms
    are taken of the logits, not of rounded probabilities: any finite logit gives a finite value and
    gradient.

    Args:
        logits: any shape, finite. Types below float32 are computed in float32.
        targets: same shape, in [0, 1]; soft targets are allowed.
        gamma_pos: focusing exponent of positives, >= 0.
        gamma_neg: focusing exponent of negatives, >= 0.
        clip: probability margin in [0, 1) by which negatives are made easier; 0 turns it off.
        eps: lower bound of the probabilities inside the logarithms, in [0, 1).

    Returns:
        The loss of each entry, shape of `logits`, >= 0.

    Raises:
        ValueError: an argument is out of range.

    Source: Ridnik et al., Asymmetric Loss For Multi-Label Classification, arXiv 2009.14119, eq. 7;
    CLSL, arXiv 2510.10055.
    """
    if gamma_pos < 0 or gamma_neg < 0:
        raise ValueError(f"asymmetric_loss: gammas must be >= 0, found {gamma_pos}, {gamma_neg}")
    if not 0 <= clip < 1:
        raise ValueError(f"asymmetric_loss: clip must lie in [0, 1), found {clip}")
    if not 0 <= eps < 1:
        raise ValueError(f"asymmetric_loss: eps must lie in [0, 1), found {eps}")
    logits, targets = _at_least_float32(logits, targets)
    log_p = jax.nn.log_sigmoid(logits)
    if clip > 0:
        log_q = jnp.log(jnp.minimum(jax.nn.sigmoid(-logits) + clip, 1.0))
    else:
        log_q = jax.nn.log_sigmoid(-logits)
    if eps > 0:
        floor = math.log(eps)
        # `where`, not `maximum`: no gradient leaks through a tie at the floor.
        log_p = jnp.where(log_p >= floor, log_p, floor)
        log_q = jnp.where(log_q >= floor, log_q, floor)
    cross_entropy = -(targets * log_p + (1.0 - targets) * log_q)

    constant = jax.lax.stop_gradient(logits)
    missed_positive = jax.nn.sigmoid(-constant)  # 1 - p, without the rounding of that difference
    missed_negative = jnp.maximum(jax.nn.sigmoid(constant) - clip, 0.0)
    missed = targets * missed_positive + (1.0 - targets) * missed_negative
    gamma = targets * gamma_pos + (1.0 - targets) * gamma_neg
    return jax.lax.stop_gradient(jnp.power(missed, gamma)) * cross_entropy


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid cross entropy in nats, element-wise and unreduced.

    With ``p = sigmoid(logits)``: ``-y log p - (1 - y) log(1 - p)``. Its mean over the known entries
    is partial BCE (Durand et al., Learning a Deep ConvNet for Multi-Label Classification with
    Partial Labels, arXiv 1902.09720), less that paper's weight by an image's share of known labels.

    Args:
        logits: any shape, finite. Types below float32 are computed in float32.
        targets: same shape, in [0, 1]; soft targets are allowed.

    Returns:
        The loss of each entry, shape of `logits`, >= 0.
    """
    logits, targets = _at_least_float32(logits, targets)
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(targets * log_p + (1.0 - targets) * log_q)


def hill_loss(
    logits: jax.Array,
    targets: jax.Array,
    *,
    margin: float = 1.0,
    gamma: float = 2.0,
) -> jax.Array:
    """Hill loss, element-wise and unreduced: easy on negatives that look positive.

    With ``p = sigmoid(logits)`` and ``m = sigmoid(logits - margin)``::

        positive: -(1 - m)^gamma log m          negative: (3/2 - p) p^2

    The gradient of a negative is 3 p^2 (1 - p)^2, largest at p = 1/2 and none at 1: an unlabelled
    positive taken for a negative, which the network contradicts, is left alone. The negative term
    is the paper's (lambda - p) p^2 with its lambda = 3/2, the positive one its focal margin loss.

    Args:
        logits: any shape, finite. Types below float32 are computed in float32.
        targets: same shape, in [0, 1].
        margin: of positives, in logits.
        gamma: focusing exponent of positives, >= 0.

    Returns:
        The loss of each entry, shape of `logits`, >= 0.

    Source: Zhang et al., Simple and Robust Loss Design for Multi-Label Learning with Missing
    Labels, arXiv 2112.07368 (Hill loss and its focal margin).
    """
    logits, targets = _at_least_float32(logits, targets)
    p = jax.nn.sigmoid(logits)
    return targets * _focal_margin(logits, margin, gamma) + (1.0 - targets) * (1.5 - p) * p**2


def focal_margin_loss(
    logits: jax.Array, targets: jax.Array, *, margin: float = 1.0, gamma: float = 2.0
) -> jax.Array:
    """Focal loss whose positives keep a margin, element-wise and unreduced.

    With ``p = sigmoid(logits)`` and ``m = sigmoid(logits - margin)``::

        positive: -(1 - m)^gamma log m          negative: -p^gamma log(1 - p)

    Args:
        logits: any shape, finite. Types below float32 are computed in float32.
        targets: same shape, in [0, 1].
        margin: of positives, in logits.
        gamma: focusing exponent, >= 0.

    Returns:
        The loss of each entry, shape of `logits`, >= 0.

    Source: arXiv 2112.07368, the loss that self-paced loss correction (SPLC) corrects.
    """
    logits, targets = _at_least_float32(logits, targets)
    negative = -(jax.nn.sigmoid(logits) ** gamma) * jax.nn.log_sigmoid(-logits)
    return targets * _focal_margin(logits, margin, gamma) + (1.0 - targets) * negative


def _focal_margin(logits: jax.Array, margin: float, gamma: float) -> jax.Array:
    logits = logits - margin
    return -(jax.nn.sigmoid(-logits) ** gamma) * jax.nn.log_sigmoid(logits)


def expected_positives_loss(logits: jax.Array, positives: jax.Array | float) -> jax.Array:
    """Squared difference of expected and given number of positives an image, as a share of C.

    With ``p = sigmoid(logits)`` and k = `positives` this is the second term, without its weight, of
    the paper's loss::

        cross entropy of the known positives + weight ((mean_n sum_c p_nc - k) / C)^2

    In the methods here that use it the first term is over known negatives as well.

    Args:
        logits: [B, C].
        positives: of an image in the mean; may be traced.

    Returns:
        Scalar.

    Source: Cole et al., Multi-Label Learning from Single Positive Labels, arXiv 2106.09708
    (expected positive regularisation).
    """
    logits = logits.astype(jnp.float32)
    expected = jnp.mean(jnp.sum(jax.nn.sigmoid(logits), axis=-1))
    return ((expected - positives) / logits.shape[-1]) ** 2


def expected_loss(elementwise: ElementwiseLoss) -> ElementwiseLoss:
    """A loss whose value at a soft target q is the mean over labels drawn with probability q.

    ``q * loss(x, 1) + (1 - q) * loss(x, 0)``: what hard labels of that frequency would give. For
    the cross-entropy it changes nothing. `asymmetric_loss` at a soft target pulls the sigmoid to q
    itself, while labels 0 and 1 pull it to where the odds of `asymmetric_log_odds` are those of q.

    Args:
        elementwise: loss of (logits, targets).

    Returns:
        Element-wise loss, equal to the one given at targets 0 and 1.
    """

    def expected(logits: jax.Array, targets: jax.Array) -> jax.Array:
        positive = elementwise(logits, jnp.ones_like(targets))
        negative = elementwise(logits, jnp.zeros_like(targets))
        return targets * positive + (1.0 - targets) * negative

    return expected


def asymmetric_log_odds(
    logits: jax.Array, *, gamma_pos: float = 0.0, gamma_neg: float = 2.0, clip: float = 0.0
) -> jax.Array:
    """Log odds of a positive that a network trained by `asymmetric_loss` stands for.

    The asymmetric loss is not a proper score: its sigmoid lies above the probability where
    negatives are focused. Where positives are found with probability q, the expected gradient of
    the loss (its weights carry none) vanishes at the sigmoid p with::

        q (1 - p)^(gamma_pos + 1) = (1 - q) (p - clip)^gamma_neg p (1 - p) / (1 - p + clip)

    which this solves for log(q / (1 - q)). With gamma_pos = clip = 0 and gamma_neg = 2 a sigmoid of
    0.5 means a probability of 0.2. All zero gives the logits themselves.

    Args:
        logits: any shape.
        gamma_pos: of the loss.
        gamma_neg: of the loss.
        clip: of the loss.

    Returns:
        float32, same shape.
    """
    logits = logits.astype(jnp.float32)
    log_p, log_not = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    focus, margin = log_p, 0.0
    if clip > 0:
        p = jnp.exp(log_p)
        focus = jnp.log(jnp.maximum(p - clip, 1e-30))
        margin = log_not - jnp.log(1.0 - p + clip)
    negative = gamma_neg * focus + log_p + margin
    positive = (gamma_pos + 1.0) * log_not
    return negative - positive


def hill_log_odds(logits: jax.Array, *, margin: float = 1.0, gamma: float = 2.0) -> jax.Array:
    """Log odds of a positive that a network trained by `hill_loss` stands for.

    Where positives are found with probability q, the expected gradient of the loss vanishes at the
    logit x with ``q / (1 - q) = l'(x, 0) / -l'(x, 1)``.

    Args:
        logits: any shape.
        margin, gamma: of the loss.

    Returns:
        float32, same shape.
    """
    logits = logits.astype(jnp.float32)
    negative = jnp.log(3.0) + 2.0 * (jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits))
    return negative - _log_focal_margin_slope(logits - margin, gamma)


def focal_margin_log_odds(
    logits: jax.Array, *, margin: float = 1.0, gamma: float = 2.0
) -> jax.Array:
    """As `hill_log_odds`, of `focal_margin_loss`: the same arguments and result."""
    logits = logits.astype(jnp.float32)
    # A negative is a positive of the other sign without a margin.
    negative = _log_focal_margin_slope(-logits, gamma)
    return negative - _log_focal_margin_slope(logits - margin, gamma)


def _log_focal_margin_slope(logits: jax.Array, gamma: float) -> jax.Array:
    """log of the derivative's size of -(1 - m)^gamma log m, m = sigmoid(logits), by the logits."""
    log_m, missed = jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
    rest = missed - gamma * jnp.exp(log_m) * log_m
    return gamma * jax.nn.log_sigmoid(-logits) + jnp.log(jnp.maximum(rest, 1e-37))


def asymmetric_shift(
    logits: jax.Array, log_ratio: jax.Array, *, gamma_pos: float = 0.0, gamma_neg: float = 2.0
) -> jax.Array:
    """Logits whose `asymmetric_log_odds` lie `log_ratio` above those of `logits`.

    It is how evidence from elsewhere joins a network trained by the asymmetric loss (without clip).
    There is no closed form; Newton's method solves it to float accuracy. The derivative is exact.

    Args:
        logits: any shape.
        log_ratio: same shape; 0 gives the logits back.
        gamma_pos: of the loss.
        gamma_neg: of the loss.

    Returns:
        float32, same shape.
    """

    def slope(x: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(x)
        return (gamma_neg + 1.0) * (1.0 - p) + (gamma_pos + 1.0) * p

    log_odds = functools.partial(asymmetric_log_odds, gamma_pos=gamma_pos, gamma_neg=gamma_neg)
    logits = logits.astype(jnp.float32)
    goal = log_odds(logits) + log_ratio
    fixed_goal = jax.lax.stop_gradient(goal)
    x = jax.lax.stop_gradient(logits + log_ratio / slope(logits))
    for _ in range(_NEWTON_STEPS):
        x = x - (log_odds(x) - fixed_goal) / slope(x)
    x = jax.lax.stop_gradient(x)
    return x + (goal - log_odds(x)) / slope(x)


def known_loss(
    losses: jax.Array,
    known: jax.Array,
    *,
    scale: str = "balanced",
    known_count: jax.Array | None = None,
    entries: int | None = None,
) -> jax.Array:
    """Reduces element-wise losses over the known entries.

    Args:
        losses: [B, C] element-wise losses.
        known: [B, C] bool, or 0 and 1.
        scale: ``balanced``: the mean over known entries, 0 when there are none. ``mean``: their sum
            divided by B * C. ``released``: their sum times 1000, or the mean times 1000 when every
            entry of the batch is known.
        known_count, entries: known entries, and all entries, of the batch that `losses` is a part
            of; results of its parts then add up to that of the batch. By default `losses` is all.

    Returns:
        Scalar.
    """
    _check_scale(scale)
    mask = known.astype(losses.dtype)
    total = jnp.sum(losses * mask)
    count = jnp.sum(mask) if known_count is None else known_count
    entries = mask.size if entries is None else entries
    if scale == "balanced":
        return total / jnp.maximum(count, 1.0)
    if scale == "mean":
        return total / max(entries, 1)
    every_label_known = count == entries
    return RELEASED_FACTOR * total / jnp.where(every_label_known, float(max(entries, 1)), 1.0)


def recovered_loss(
    losses: jax.Array,
    weight: jax.Array,
    unknown: jax.Array,
    *,
    scale: str = "balanced",
    unknown_count: jax.Array | None = None,
    entries: int | None = None,
) -> jax.Array:
    """Reduces element-wise losses against recovered labels.

    Args:
        losses: [B, C] element-wise losses.
        weight: [B, C] weight of each recovered entry; not read by ``released``.
        unknown: [B, C] bool, or 0 and 1; not read by ``released``.
        scale: ``balanced``: sum of ``weight * losses`` over unknown entries, divided by the number
            of unknown entries (recovered or not), or of known ones where these are more. ``mean``:
            the same sum divided by B * C. ``released``: the mean over all B * C entries, known ones
            included, times 1000.
        unknown_count, entries: of the batch that `losses` is a part of, as in `known_loss`.

    Returns:
        Scalar, before the recovered term's own factor.
    """
    _check_scale(scale)
    if scale == "released":
        if entries is None:
            return RELEASED_FACTOR * jnp.mean(losses)
        return RELEASED_FACTOR * jnp.sum(losses) / entries
    mask = unknown.astype(losses.dtype)
    total = jnp.sum(losses * weight * mask)
    entries = mask.size if entries is None else entries
    if scale == "mean":
        return total / max(entries, 1)
    count = jnp.sum(mask) if unknown_count is None else unknown_count
    return total / jnp.maximum(jnp.maximum(count, entries - count), 1.0)


def clsl_loss(
    semantic_logits: jax.Array,
    global_logits: jax.Array | None,
    annotations: jax.Array,
    recovered: jax.Array,
    recovered_weight: jax.Array,
    *,
    elementwise: ElementwiseLoss = asymmetric_loss,
    scale: str = "balanced",
    recovered_scale: jax.Array | float = 0.8,
    global_scale: jax.Array | float = 1.0,
    smoothing: float = 0.0,
    known_count: jax.Array | None = None,
    entries: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total training loss of both branches, ``known + recovered_scale * recovered``.

    ``released``: ``known`` is `known_loss` of the semantic branch alone; ``recovered`` is
    `recovered_loss` of the global branch against the labels where known and `recovered` elsewhere,
    without weights, and 0 when there is no global branch.

    ``balanced`` and ``mean``: both terms are summed over the branches present, the global branch's
    times `global_scale`.

    Args:
        semantic_logits: [B, C], z1.
        global_logits: [B, C], z0, or None when the model has no global branch.
        annotations: [B, C], 1 positive, 0 negative, -1 unknown.
        recovered: [B, C] in [0, 1], read at unknown entries. Carries no gradient.
        recovered_weight: [B, C] >= 0, read at unknown entries, not by ``released``. Carries no
            gradient.
        elementwise: function of logits and targets, e.g. `asymmetric_loss` with its exponents
            bound.
        scale: ``balanced``, ``mean`` or ``released``.
        recovered_scale: factor of the recovered term (lambda); may be traced, for a ramp.
        global_scale: factor of the global branch, not under ``released``; may be traced.
        smoothing: known labels y become ``(1 - smoothing) y + smoothing / 2``.
        known_count, entries: known entries, float [], and all entries of the batch that the arrays
            are a part of; losses and gradients of its parts then add up to those of the batch. By
            default the arrays are all of it.

    Returns:
        The total (scalar) and its terms ``known`` and ``recovered``, the latter before
        `recovered_scale`.

    Raises:
        ValueError: `scale` is none of these.

    Source: CLSL, arXiv 2510.10055, training objective; the released program's scale where named so.
    """
    _check_scale(scale)
    known = annotations >= 0
    labels = (1.0 - smoothing) * annotations + 0.5 * smoothing if smoothing else annotations
    targets = jax.lax.stop_gradient(jnp.where(known, labels, recovered))
    weight = jax.lax.stop_gradient(recovered_weight)

    known_mean = functools.partial(
        known_loss, known=known, scale=scale, known_count=known_count, entries=entries
    )
    recovered_mean = functools.partial(
        recovered_loss,
        weight=weight,
        unknown=~known,
        scale=scale,
        unknown_count=None if known_count is None else entries - known_count,
        entries=entries,
    )

    semantic = elementwise(semantic_logits, targets)
    known_term = known_mean(semantic)
    if scale == "released":
        recovered_term = jnp.zeros_like(known_term)
        if global_logits is not None:
            losses = elementwise(global_logits, targets)
            recovered_term = recovered_mean(losses)
    else:
        recovered_term = recovered_mean(semantic)
        if global_logits is not None:
            losses = elementwise(global_logits, targets)
            known_term += global_scale * known_mean(losses)
            recovered_term += global_scale * recovered_mean(losses)
    total = known_term + recovered_scale * recovered_term
    return total, {"known": known_term, "recovered": recovered_term}


def _at_least_float32(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(jnp.result_type(logits), jnp.float32)
    return jnp.asarray(logits, dtype), jnp.asarray(targets, dtype)


def _check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"loss scale {scale!r} is unknown: use one of {', '.join(SCALES)}")
