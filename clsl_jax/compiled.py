"""Ahead-of-time compilation of a run's functions, each exactly once, with a memory report."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from clsl_jax import recovery, sharding, steps
from clsl_jax.experiment import Experiment, needs_clean_view
from clsl_jax.train_state import evaluation_weights


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Compiled functions; a call with other shapes is an error, not a second compilation.

    Attributes:
      train: `train(state, batch) -> state`; the state given is consumed. None without training.
      recover: `recover(state) -> state`; likewise.
      predict: `predict(weights, images [B, S, S, 3]) -> probabilities [B, C]`; like the train step
        it takes features [B, h, w, D] instead where the frozen backbone's are cached.
      count: `count(recovered, weight, annotations, labels)` -> (RecoveryCounts, numbers of
        recovered positives and negatives).
      explain: `explain(weights, images) -> (probabilities, position weights, attention)`, any B.
    """

    train: Callable[..., Any] | None
    recover: Callable[..., Any] | None
    predict: Callable[..., Any]
    count: Callable[..., Any]
    explain: Callable[..., Any]


def compile_steps(
    built: Experiment,
    config: ml_collections.ConfigDict,
    *,
    report: Callable[[str], None] = lambda line: None,
    training: bool = True,
) -> CompiledSteps:
    """Compiles what a run needs before its first step.

    Args:
      built: the experiment.
      config: its configuration.
      report: takes a line for each function: seconds, memory of one device.
      training: False leaves the train step and recovery out.
    """
    state = built.abstract_state
    rows, alike = sharding.by_row(built.mesh), sharding.replicated(built.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)

    def images(batch_size: int) -> jax.ShapeDtypeStruct:
        shape, dtype = built.input_shape, built.input_dtype
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)

    train = recover = None
    if training:
        batch = {
            "image": images(built.batch_size),
            "row": jax.ShapeDtypeStruct((built.batch_size,), jnp.int32, sharding=rows),
        }
        if needs_clean_view(built.options, config):
            batch["clean"] = images(built.batch_size)
        step = steps.make_train_step(built.step_model, built.optimizer, built.options)
        train = _compile(step, (state, batch), shardings, report, donate_argnums=0)
        recover = _compile(
            steps.make_recover(built.options), (state,), shardings, report, donate_argnums=0
        )
    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alike),
        evaluation_weights(state, ema=built.options.evaluate_ema),
    )
    predict_step = steps.make_predict_step(built.step_model)
    predict = _compile(predict_step, (weights, images(built.eval_batch_size)), rows, report)
    labels = jax.ShapeDtypeStruct(state.annotations.shape, jnp.int8, sharding=rows)
    matrices = (state.recovered, state.recovered_weight, state.annotations, labels)
    count = _compile(_count, matrices, alike, lambda line: None)
    explain = jax.jit(steps.make_predict_step(built.model, explain=True), out_shardings=alike)
    return CompiledSteps(train, recover, predict, count, explain)


def _count(
    recovered: jax.Array, weight: jax.Array, annotations: jax.Array, labels: jax.Array
) -> tuple[recovery.RecoveryCounts, tuple[jax.Array, jax.Array]]:
    counts = recovery.recovery_counts(recovered, weight, annotations, labels)
    return counts, recovery.recovered_numbers(recovered, weight)


def _compile(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    out_shardings: Any,
    report: Callable[[str], None],
    **options: Any,
) -> Callable[..., Any]:
    start = time.perf_counter()
    jitted = jax.jit(function, out_shardings=out_shardings, **options)
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    line = f"compiled {function.__name__} in {seconds:.1f} s"
    if memory is not None:
        held = memory.argument_size_in_bytes / 2**20
        scratch = memory.temp_size_in_bytes / 2**20
        line += f": {held:,.0f} MiB of arguments and {scratch:,.0f} MiB of temporaries a device"
    report(line)
    return compiled
