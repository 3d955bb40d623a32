"""The end of an epoch: from the scores that its steps kept to recovered labels, in one call."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clsl_jax import label_statistics, recovery, sharding
from clsl_jax.models.graph import label_adjacency
from clsl_jax.step_options import StepOptions
from clsl_jax.train_state import TrainState


def make_recover(
    options: StepOptions, *, mesh: Mesh | None = None
) -> Callable[[TrainState], TrainState]:
    """Returns `recover(state) -> state`, the end of an epoch: one call over the whole matrices.

    Done twice, it gives what it gives once. Without a `mesh`, the state lies on one device.
    """

    def recover(state: TrainState) -> TrainState:
        if options.recovery_mode == "estimate":
            known, seen = state.annotations >= 0, (state.visits > 0)[:, None]
            labels = state.annotations.astype(jnp.float32)
            return state.replace(
                recovered=jnp.where(known, labels, jnp.where(seen, state.scores, 0.0)),
                recovered_weight=(~known & seen).astype(jnp.float32),
            )
        if options.recovery_mode != "epoch":
            return state
        recovered, weight = recovered_labels(state, options, mesh)
        state = state.replace(recovered=recovered, recovered_weight=weight)
        if options.graph_layers and options.graph_refresh:
            # What comes with a known positive: labels that are known, or as probable as they are.
            known = state.annotations >= 0
            adjacency = label_adjacency(
                state.recovered,
                (known | (state.recovered_weight > 0)).astype(jnp.float32),
                options.graph_threshold,
                options.graph_smoothing,
                given=known,
            )
            state = state.replace(adjacency=adjacency)
        if options.hands_out_others:
            # Nothing learns from these any more: they are for whoever asked for labels.
            recovered, weight = jax.lax.cond(
                state.step >= options.total_steps,
                lambda: recovered_labels(state, options.handing_out, mesh),
                lambda: (state.recovered, state.recovered_weight),
            )
            state = state.replace(recovered=recovered, recovered_weight=weight)
        return state

    return recover


def recovered_labels(
    state: TrainState, options: StepOptions, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns `recovery.recover_labels` of a state at the end of an epoch, float32 [N, C] each.

    Args:
      state: whose scores and annotations they are made of.
      options: of the run for labels to learn from, their `handing_out` for those to hand out.
      mesh: the state's; None if it lies on one device.
    """
    scores, visits = recovery_scores(state, options)
    positive, negative = recovery_thresholds(state, scores, visits, options, mesh)
    return recovery.recover_labels(
        scores,
        visits,
        state.annotations,
        positive_threshold=positive,
        negative_threshold=negative,
        soft=options.soft,
        confidence_power=options.confidence_power,
        active=state.step >= options.warmup_steps,
    )


def recovery_scores(state: TrainState, options: StepOptions) -> tuple[jax.Array, jax.Array]:
    """Returns what labels are recovered from: probabilities [N, C], and visits [N].

    They are what the steps scattered, or what label statistics make of it.

    Args:
      state: at the end of an epoch.
      options: of the run, or their `handing_out`.
    """
    if options.source in ("scores", "prototypes"):
        return state.scores, state.visits
    visits = (state.annotations >= 0).any(axis=1).astype(jnp.int32)
    if options.source == "co_occurrence":
        return label_statistics.co_occurrence_scores(state.annotations), visits
    scores = None
    if options.source == "both":
        visits = jnp.maximum(visits, state.visits)  # a row without a known label has its scores
        seen = (state.visits > 0)[:, None]
        scores = jnp.where(seen, state.scores, state.memory["frequencies"])
    return label_statistics.informed_probabilities(state.memory, state.annotations, scores), visits


def recovery_thresholds(
    state: TrainState,
    scores: jax.Array,
    visits: jax.Array,
    options: StepOptions,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the thresholds of positives and negatives, [C] or scalar; 0 and 0 take every label.

    Args:
      state: whose annotations calibrate them.
      scores, visits: from `recovery_scores`.
      options: of the run, or their `handing_out`.
      mesh: the state's; None if it lies on one device.
    """
    if options.thresholds == "fixed":
        return jnp.float32(options.positive_threshold), jnp.float32(options.negative_threshold)
    if options.thresholds == "none":
        return jnp.float32(0.0), jnp.float32(0.0)
    if options.thresholds == "matched":
        thresholds = functools.partial(
            recovery.matched_thresholds,
            positive_coverage=options.positive_coverage,
            negative_coverage=options.negative_coverage,
            min_known=options.min_known,
        )
    else:
        expected = options.calibration == "expected"
        thresholds = functools.partial(
            recovery.expected_thresholds if expected else recovery.adaptive_thresholds,
            positive_precision=options.positive_precision,
            negative_precision=options.negative_precision,
            min_count=options.min_count,
            min_known=options.min_known,
        )
    if mesh is not None:
        # Each device counts its own cells; one sum of the counts is all that is exchanged.
        matrix = sharding.by_row_and_class(mesh, state.scores.shape[1]).spec
        thresholds = jax.shard_map(
            functools.partial(thresholds, axis_name="data"),
            mesh=mesh,
            in_specs=(matrix, matrix, PartitionSpec("data")),
            out_specs=PartitionSpec(matrix[1]),
        )
    return thresholds(scores, state.annotations, visits)
