"""Ahead-of-time compilation of a run's functions, each exactly once, with a memory report."""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from clsl_jax import cluster, recovery, sharding, steps
from clsl_jax.errors import InputError
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
        recovered positives and negatives). None where no labels are recovered into a matrix.
      explain: `explain(weights, images) -> (probabilities, position weights)`, any B.
    """

    train: Callable[..., Any] | None
    recover: Callable[..., Any] | None
    predict: Callable[..., Any]
    count: Callable[..., Any] | None
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
    alike, examples = sharding.replicated(built.mesh), sharding.by_example(built.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)

    def images(batch_size: int) -> jax.ShapeDtypeStruct:
        shape, dtype = built.input_shape, built.input_dtype
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=examples)

    train = recover = None
    if training:
        batch = {
            "image": images(built.batch_size),
            "row": jax.ShapeDtypeStruct((built.batch_size,), jnp.int32, sharding=examples),
        }
        if needs_clean_view(built.options, config):
            batch["clean"] = images(built.batch_size)
        step = steps.make_train_step(
            built.step_model, built.optimizer, built.options, mesh=built.mesh
        )
        train_step = jax.jit(step, out_shardings=shardings, donate_argnums=0)
        train = _compile(train_step, (state, batch), report)
        _check_memory(train, train_step, built, config, batch, report)
        recover_step = steps.make_recover(built.options, mesh=built.mesh)
        recover = _compile(
            jax.jit(recover_step, out_shardings=shardings, donate_argnums=0), (state,), report
        )
    weights = evaluation_weights(state, ema=built.options.evaluate_ema)
    predict_step = steps.make_predict_step(built.step_model, built.options, mesh=built.mesh)
    predict = _compile(
        jax.jit(predict_step, out_shardings=examples),
        (weights, images(built.eval_batch_size)),
        report,
    )
    count = None
    if built.options.teaches:
        matrices = (state.recovered, state.recovered_weight, state.annotations, state.annotations)
        count = jax.jit(_count, out_shardings=alike).lower(*matrices).compile()
    explain_step = steps.make_predict_step(built.model, built.options, explain=True)
    explain = jax.jit(explain_step, out_shardings=alike)
    cluster.meet("has compiled")
    return CompiledSteps(train, recover, predict, count, explain)


def _check_memory(
    train: Any,
    train_step: Any,
    built: Experiment,
    config: ml_collections.ConfigDict,
    batch: dict[str, jax.ShapeDtypeStruct],
    report: Callable[[str], None],
) -> None:
    """Raises InputError, naming the largest batch that fits, where the train step does not.

    XLA's figures are known before anything is run. `train` is `train_step` compiled for `batch`.
    """
    room = _room(built, config)
    beside = _diagnosed(built)
    needed = _peak(train) + beside
    if not room or not needed or needed <= room:
        return
    report("The train step does not fit; looking for the largest batch that does ...")
    multiple = built.mesh.size * config.optim.accumulate

    def peak(batch_size: int) -> int:
        smaller = {
            name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for name, x in batch.items()
        }
        return _peak(train_step.lower(built.abstract_state, smaller).compile()) + beside

    fits = largest_that_fits(peak, room, failed=(built.batch_size, needed), multiple=multiple)
    remedy = f"The largest batch_size that fits is {fits}. " if fits else "No batch fits. "
    raise InputError(
        f"batch_size={built.batch_size} needs {needed / 2**30:.2f} GiB of a device's "
        f"{room / 2**30:.2f} GiB. {remedy}Or keep the batch with optim.accumulate="
        f"{2 * config.optim.accumulate} (or more), model.remat=blocks or model.dtype=bfloat16, or "
        + (
            "use fewer cpu_devices; memory_gb says what a device may use, if that is not right."
            if jax.default_backend() == "cpu"
            else "use more devices."
        )
    )


def largest_that_fits(
    peak: Callable[[int], int], room: int, *, failed: tuple[int, int], multiple: int
) -> int:
    """Returns the largest batch size whose peak is within `room`, 0 if there is none.

    What a step needs grows about linearly with the batch, so few sizes have to be compiled: after
    the smallest, those on the line between the largest that fits and the smallest that does not.

    Args:
      peak: bytes needed for a batch size, not falling with it.
      room: bytes.
      failed: a batch size that does not fit, and its peak.
      multiple: batch sizes must be multiples of it.
    """
    low, low_peak = 0, 0  # fits; its peak, once known
    high, high_peak = failed
    while high - low > multiple:
        guess = multiple  # the smallest first: if it does not fit, none does
        if low:  # along the line between the two
            share = (room - low_peak) / (high_peak - low_peak)
            guess = low + int(share * (high - low))
            guess = min(max(guess // multiple * multiple, low + multiple), high - multiple)
        found = peak(guess)
        if found <= room:
            low, low_peak = guess, found
        else:
            high, high_peak = guess, found
    return low


def _room(built: Experiment, config: ml_collections.ConfigDict) -> int:
    """Bytes that a device may use, 0 where that is not known."""
    if config.memory_gb:
        return int(config.memory_gb * 2**30)
    device = next(d for d in built.mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


def host_memory(
    groups: Sequence[str] = (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ),
) -> int:
    """Returns the bytes of memory that this machine has, or its container may use.

    Args:
      groups: files with a limit of the control group, of both versions of these.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in groups:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(pathlib.Path(path).read_text(encoding="utf-8")))
    return min(limits)


def _diagnosed(built: Experiment) -> int:
    """Bytes of one device's rows of the full labels, which lie there for `CompiledSteps.count`."""
    annotations = built.abstract_state.annotations
    if not built.options.teaches:
        return 0
    return math.prod(annotations.sharding.shard_shape(annotations.shape))


def _peak(compiled: Any) -> int:
    """Bytes that a compiled function needs of one device, 0 where XLA does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _count(
    recovered: jax.Array, weight: jax.Array, annotations: jax.Array, labels: jax.Array
) -> tuple[recovery.RecoveryCounts, tuple[jax.Array, jax.Array]]:
    counts = recovery.recovery_counts(recovered, weight, annotations, labels)
    return counts, recovery.recovered_numbers(recovered, weight)


def _compile(
    jitted: Any, arguments: tuple[Any, ...], report: Callable[[str], None]
) -> Callable[..., Any]:
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    line = f"compiled {jitted.__name__} in {seconds:.1f} s"
    if memory is not None:
        held = memory.argument_size_in_bytes / 2**20
        scratch = memory.temp_size_in_bytes / 2**20
        line += f": {held:,.0f} MiB of arguments and {scratch:,.0f} MiB of temporaries a device"
    report(line)
    return compiled
