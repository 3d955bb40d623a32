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

from clsl_jax import cluster, epoch_end, recovery, sharding, steps
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
    weights_alone: bool = False,
) -> CompiledSteps:
    """Compiles what a run needs before its first step.

    Args:
      built: the experiment.
      config: its configuration.
      report: takes a line for each function: seconds, memory of one device.
      training: False leaves the train step and recovery out.
      weights_alone: nothing else of a run's state will lie on the devices.
    """
    state = built.abstract_state
    alike, examples = sharding.replicated(built.mesh), sharding.by_example(built.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    room = _room(built, config)
    # The full labels, which lie on the devices beside the state for `count`.
    diagnosed = _held(state.annotations) if built.options.teaches else 0

    def images(batch_size: int) -> jax.ShapeDtypeStruct:
        shape, dtype = built.input_shape, built.input_dtype
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=examples)

    train = recover = None
    if training:
        step = steps.make_train_step(
            built.step_model, built.optimizer, built.options, mesh=built.mesh
        )

        def train_arguments(batch_size: int) -> tuple[Any, ...]:
            row = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=examples)
            batch = {"image": images(batch_size), "row": row}
            if needs_clean_view(built.options, config):
                batch["clean"] = images(batch_size)
            return state, batch

        train = _compile_for_batch(
            jax.jit(step, out_shardings=shardings, donate_argnums=0),
            train_arguments,
            built.batch_size,
            room=room,
            beside=diagnosed,
            ahead=sharding.TRAIN_AHEAD,
            key="batch_size",
            multiple=built.mesh.size * config.optim.accumulate,
            remedy=f"keep the batch with optim.accumulate={2 * config.optim.accumulate} (or more), "
            "model.remat=blocks or model.dtype=bfloat16, or ",
            report=report,
        )
        recover_step = epoch_end.make_recover(built.options, mesh=built.mesh)
        recover = _compile(
            jax.jit(recover_step, out_shardings=shardings, donate_argnums=0), (state,), report
        )
        needed = _peak(recover) + diagnosed
        if room and needed > room:
            rows, columns = built.annotations.shape
            raise InputError(
                f"Recovering {rows:,} x {columns:,} labels needs {_of_a_device(needed, room)}. "
                f"The batch plays no part in it: {_other_devices()}"
            )
    weights = evaluation_weights(state, ema=built.options.evaluate_ema)
    # A run holds all of its state as it is evaluated; at its end the best weights are others.
    beside = 0 if weights_alone else _held(state) + diagnosed
    predict_step = steps.make_predict_step(built.step_model, built.options, mesh=built.mesh)
    remedy = "choose model.dtype=bfloat16, or " if training else ""  # a trained run keeps its own
    predict = _compile_for_batch(
        jax.jit(predict_step, out_shardings=examples),
        lambda batch_size: (weights, images(batch_size)),
        built.eval_batch_size,
        room=room,
        beside=beside,
        ahead=sharding.EVALUATION_AHEAD,
        key="evaluation.batch_size",
        multiple=built.mesh.size,
        remedy=remedy,
        report=report,
    )
    count = None
    if built.options.teaches:
        matrices = (state.recovered, state.recovered_weight, state.annotations, state.annotations)
        count = jax.jit(_count, out_shardings=alike).lower(*matrices).compile()
    explain_step = steps.make_predict_step(built.model, built.options, explain=True)
    explain = jax.jit(explain_step, out_shardings=alike)
    cluster.meet("has compiled")
    return CompiledSteps(train, recover, predict, count, explain)


def _compile_for_batch(
    jitted: Any,
    arguments: Callable[[int], tuple[Any, ...]],
    size: int,
    *,
    room: int,
    beside: int,
    ahead: int,
    key: str,
    multiple: int,
    remedy: str,
    report: Callable[[str], None],
) -> Callable[..., Any]:
    """Returns `jitted` compiled for a batch, if a device can run it by XLA's own figures.

    Args:
      jitted: the function.
      arguments: what it takes with a batch of so many examples, which is the last of them.
      size: of the batch.
      room: bytes that a device may use, 0 if that is not known.
      beside: bytes of what lies there and is no argument, but for batches.
      ahead: so many other batches lie there.
      key: of the configuration, that sets the batch.
      multiple: of which every batch has to be one.
      remedy: another way out, in front of "use more devices".
      report: takes a line.

    Raises:
      InputError: if it does not fit; names the largest batch that does.
    """

    def beside_it(batch_size: int) -> int:
        return beside + ahead * _held(arguments(batch_size)[-1])

    compiled = _compile(jitted, arguments(size), report)
    needed = _peak(compiled) + beside_it(size)
    if not room or needed <= room:
        return compiled
    report(f"{jitted.__name__} does not fit; looking for the largest {key} that does ...")
    fits = largest_that_fits(
        lambda smaller: _peak(jitted.lower(*arguments(smaller)).compile()) + beside_it(smaller),
        room,
        failed=(size, needed),
        multiple=multiple,
    )
    largest = f"The largest {key} that fits is {fits}. Or " if fits else "No batch fits: "
    raise InputError(
        f"{key}={size} needs {_of_a_device(needed, room)}. {largest}{remedy}{_other_devices()}"
    )


def _of_a_device(needed: int, room: int) -> str:
    return f"{needed / 2**30:.2f} GiB of a device's {room / 2**30:.2f} GiB"


def _other_devices() -> str:
    if jax.default_backend() == "cpu":
        return (
            "use fewer cpu_devices, or processes on a host; memory_gb says what a device may use, "
            "if that is not right."
        )
    return "use more devices."


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
    """Bytes that every device may use, 0 where that is not known; alike on all processes."""
    device = next(d for d in built.mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform == "cpu":
        room = host_memory() // (jax.local_device_count() * cluster.processes_here())
    else:
        room = int((device.memory_stats() or {}).get("bytes_limit", 0))
    if config.memory_gb:
        room = int(config.memory_gb * 2**30)
    return cluster.smallest(room)


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


def _held(arrays: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


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
