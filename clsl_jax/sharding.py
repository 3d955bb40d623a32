"""The device mesh and how arrays lie on it."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clsl_jax.errors import InputError

ROW_MULTIPLE = 256  # any mesh of up to 256 devices divides padded matrices


def divide_cpu(devices: int) -> None:
    """Divides the CPU into so many devices, before JAX has started.

    Most of XLA's CPU code runs on one thread a device. Where XLA_FLAGS already says how many there
    are, or JAX has started, nothing changes.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes `data` (all devices) and `model` (1).

    Axes are `Auto`: under `Explicit` ones, indexing a row-sharded matrix by sharded rows raises.

    Args:
      devices: the devices to use; all by default.
    """
    devices = jax.devices() if devices is None else devices
    grid = np.asarray(devices).reshape(len(devices), 1)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is spread over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def padded_rows(count: int) -> int:
    """Returns the number of rows of a matrix with a row for each of `count` examples."""
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(matrix: np.ndarray, fill: float) -> np.ndarray:
    """Returns `matrix` [N, ...] with rows of `fill` appended up to `padded_rows(N)`."""
    missing = padded_rows(len(matrix)) - len(matrix)
    tail = np.full((missing, *matrix.shape[1:]), fill, matrix.dtype)
    return np.concatenate([matrix, tail])


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Places process-local rows [b, ...] as global arrays [b * processes, ...] sharded by row."""
    sharding = by_row(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def put_global_rows(mesh: Mesh, matrix: np.ndarray) -> jax.Array:
    """Places a matrix that every process holds whole so that each device keeps its rows only."""
    sharding = by_row(mesh)
    return jax.make_array_from_callback(matrix.shape, sharding, lambda index: matrix[index])


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Places a tree that every process holds alike on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]),
        tree,
    )


def check_divides(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless the global batch spreads evenly over the devices."""
    devices = mesh.shape["data"]
    if batch_size % devices:
        raise InputError(
            f"batch_size={batch_size} does not spread over {devices} devices: "
            f"choose a multiple of {devices}."
        )
