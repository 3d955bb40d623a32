"""The optimiser of the CLSL recipe: AdamW under one cycle of rate and momentum, and EMA."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


class OneCycle(NamedTuple):
    """The two schedules of one cycle, functions of the step counted from 0.

    Attributes:
        learning_rate: step -> learning rate, float32 scalar.
        beta1: step -> first-moment decay of Adam, float32 scalar; cycled against the rate.
    """

    learning_rate: Schedule
    beta1: Schedule


def one_cycle(
    peak: float,
    total_steps: int,
    *,
    warmup_fraction: float = 0.2,
    initial_divisor: float = 25.0,
    final_divisor: float = 1e4,
    beta1_min: float = 0.85,
    beta1_max: float = 0.95,
) -> OneCycle:
    """One cosine cycle: rate up, then down to almost nothing, and beta1 the other way.

    The rate rises from ``peak / initial_divisor`` at step 0 to `peak` at step
    ``warmup_fraction * total_steps - 1`` and falls to ``peak / initial_divisor / final_divisor`` at
    step ``total_steps - 1``, where it stays; beta1 goes from `beta1_max` to `beta1_min` and back
    over the same steps. These are the values of torch's OneCycleLR(anneal_strategy="cos").

    Args:
        peak: highest learning rate, > 0.
        total_steps: steps in the cycle, >= 1.
        warmup_fraction: share of the steps that rise, in [0, 1].
        initial_divisor: `peak` over the first rate.
        final_divisor: first rate over the last rate.
        beta1_min: beta1 at the peak.
        beta1_max: beta1 at both ends.

    Returns:
        Two schedules that take a Python or a traced step.

    Raises:
        ValueError: `total_steps` or `warmup_fraction` is out of range.

    Source: Smith and Topin, Super-Convergence, arXiv 1708.07120.
    """
    if total_steps < 1:
        raise ValueError(f"one_cycle: total_steps must be at least 1, found {total_steps}")
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"one_cycle: warmup_fraction must lie in [0, 1], found {warmup_fraction}")
    turn = warmup_fraction * total_steps - 1.0
    last = total_steps - 1.0

    def between(first: float, middle: float, final: float) -> Schedule:
        def schedule(step: jax.Array | int) -> jax.Array:
            step = jnp.minimum(jnp.asarray(step, jnp.float32), last)
            to_turn = (turn - step) / turn if turn > 0 else jnp.zeros_like(step)
            to_end = (last - step) / (last - turn) if last > turn else jnp.zeros_like(step)
            return jnp.where(
                step <= turn, _cosine(first, middle, to_turn), _cosine(middle, final, to_end)
            )

        return schedule

    initial = peak / initial_divisor
    return OneCycle(
        learning_rate=between(initial, peak, initial / final_divisor),
        beta1=between(beta1_max, beta1_min, beta1_max),
    )


class AdamWState(NamedTuple):
    """State of `adamw_cycled`.

    Attributes:
        count: int32 scalar, updates made so far.
        mu: first moments, shaped like the parameters.
        nu: second moments, shaped like the parameters.
    """

    count: jax.Array
    mu: Any
    nu: Any


def adamw_cycled(
    learning_rate: Schedule | float,
    beta1: Schedule | float = 0.9,
    *,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    max_gradient_norm: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW whose rate and beta1 may change every step, equal to torch's AdamW.

    The bias correction of the first moment uses the *current* step's beta1 alone, ``1 - beta1^t``,
    as torch does when OneCycleLR cycles the momentum. Weight decay is decoupled,
    ``-lr * decay * param``, and applies to every parameter, biases and norms included.

    Args:
        learning_rate: number, or schedule of the step counted from 0.
        beta1: number, or schedule of the step counted from 0.
        beta2: second-moment decay, in [0, 1).
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled decay, 0 turns it off.
        max_gradient_norm: gradients are first scaled down to this global norm; 0 turns it off.

    Returns:
        A transformation whose ``update`` needs the parameters.

    Raises:
        ValueError: ``update`` is called without the parameters.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """

    def init(params: Any) -> AdamWState:
        return AdamWState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update(grads: Any, state: AdamWState, params: Any = None) -> tuple[Any, AdamWState]:
        if params is None:
            raise ValueError("adamw_cycled: update(grads, state, params) needs the parameters")
        rate = _at(learning_rate, state.count)
        b1 = _at(beta1, state.count)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: m + (1.0 - b1) * (g - m), state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1.0 - beta2) * g * g, state.nu, grads)
        step_size = rate / (1.0 - b1**count)
        # expm1: in float32 1 - 0.999^t would lose four digits in the first steps.
        correction = -jnp.expm1(count * math.log(beta2)) if beta2 > 0 else 1.0

        def change(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            adam = step_size * m / (jnp.sqrt(v) / jnp.sqrt(correction) + eps)
            return (-rate * weight_decay * p - adam).astype(p.dtype)

        return jax.tree.map(change, params, mu, nu), AdamWState(count, mu, nu)

    adamw = optax.GradientTransformation(init, update)
    if max_gradient_norm > 0:
        return optax.chain(optax.clip_by_global_norm(max_gradient_norm), adamw)
    return adamw


def ema_update(ema: Any, new: Any, decay: jax.Array | float) -> Any:
    """Exponential moving average of two trees, ``decay * ema + (1 - decay) * new``.

    Args:
        ema: tree of the averages, of floating types.
        new: tree of the same structure and shapes.
        decay: in [0, 1].

    Returns:
        The new averages, of the types of `ema`.
    """

    def average(old: jax.Array, value: jax.Array) -> jax.Array:
        return (decay * old + (1.0 - decay) * value).astype(jnp.result_type(old))

    return jax.tree.map(average, ema, new)


def _cosine(first: float, last: float, remaining: jax.Array) -> jax.Array:
    # sin^2 of what remains, not (1 + cos)/2 of what is done: in float32 the latter loses the digits
    # of a last value far below the first.
    return last + (first - last) * jnp.square(jnp.sin(0.5 * jnp.pi * remaining))


def _at(value: Schedule | float, step: jax.Array) -> jax.Array:
    return value(step) if callable(value) else jnp.asarray(value, jnp.float32)
