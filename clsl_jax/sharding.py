"""The device mesh and how arrays lie on it."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clsl_jax.errors import InputError

ROW_MULTIPLE = 256  # divided by the devices along `data`, where these are a power of two


def divide_cpu(devices: int) -> None:
    """Divides the CPU into so many devices, before JAX has started.

    Most of XLA's CPU code runs on one thread a device. Where XLA_FLAGS already says how many there
    are, or JAX has started, nothing changes.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(devices: Sequence[jax.Device] | None = None, *, model: int = 1) -> Mesh:
    """Returns a mesh with axes `data` and `model`.

    Axes are `Auto`: under `Explicit` ones, indexing a row-sharded matrix by sharded rows raises.

    Args:
      devices: the devices to use; all by default.
      model: devices along `model`; the others lie along `data`.

    Raises:
      InputError: if they do not make whole groups of `model`, on CPUs within each process.
    """
    devices = jax.devices() if devices is None else devices
    _check_groups(devices, model)
    grid = np.asarray(devices).reshape(-1, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def _check_groups(devices: Sequence[jax.Device], model: int) -> None:
    count, whose = len(devices), ""
    if devices[0].platform == "cpu":
        # XLA's CPU runtime keeps no order between the exchanges in a loop over the classes, which
        # are a group's, and those outside of it: its processes may wait for one another for ever.
        count = sum(d.process_index == devices[0].process_index for d in devices)
        whose = " of a process, as it has to on CPUs"
    if count % model:
        raise InputError(
            f"mesh.model={model} does not divide the {count} devices{whose}: choose a divisor."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is spread over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def by_example(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "model")))


def by_row_and_class(mesh: Mesh, num_classes: int) -> NamedSharding:
    """Returns the sharding of a matrix [N, C]: rows over `data`, classes over `model`.

    Classes stay together where `model` does not divide them.
    """
    divides = num_classes % mesh.shape["model"] == 0
    return NamedSharding(mesh, PartitionSpec("data", "model" if divides else None))


def padded_rows(count: int) -> int:
    """Returns the number of rows of a matrix with a row for each of `count` examples."""
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(matrix: np.ndarray, fill: float) -> np.ndarray:
    """Returns `matrix` [N, ...] with rows of `fill` appended up to `padded_rows(N)`."""
    missing = padded_rows(len(matrix)) - len(matrix)
    tail = np.full((missing, *matrix.shape[1:]), fill, matrix.dtype)
    return np.concatenate([matrix, tail])


# Batches that may lie on the devices beside the one at work: of training, of an evaluation.
TRAIN_AHEAD, EVALUATION_AHEAD = 2, 1


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Places process-local rows [b, ...] as a global batch [b * processes, ...] on all devices."""
    sharding = by_example(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def put(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """Places an array that every process holds whole so that each device keeps its part only."""
    return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])


def put_matrix(mesh: Mesh, matrix: np.ndarray) -> jax.Array:
    """Places [N, C] so that each device keeps its part only."""
    return put(matrix, by_row_and_class(mesh, matrix.shape[1]))


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Places a tree that every process holds alike on every device."""
    where = replicated(mesh)
    return jax.tree.map(lambda x: put(x, where), tree)


def check_divides(name: str, batch_size: int, mesh: Mesh, *, parts: int = 1) -> None:
    """Raises InputError unless a global batch spreads evenly over the devices.

    Args:
      name: the configuration key of the size.
      batch_size: over all devices.
      mesh: of devices.
      parts: into which each device divides its examples (`optim.accumulate`).
    """
    least = mesh.size * parts
    if batch_size % least:
        what = f"{mesh.size} devices" + (f" x optim.accumulate={parts} parts" if parts > 1 else "")
        raise InputError(
            f"{name}={batch_size} does not spread over {what}: choose a multiple of {least}."
        )
