"""Meshes and placement."""

import jax
import numpy as np
import pytest

from clsl_jax import sharding
from clsl_jax.errors import InputError


@pytest.mark.parametrize(("count", "padded"), [(1, 256), (256, 256), (257, 512), (5011, 5120)])
def test_padded_rows(count, padded):
    assert sharding.padded_rows(count) == padded
    matrix = np.arange(count * 2).reshape(count, 2)
    full = sharding.pad_rows(matrix, -1)
    np.testing.assert_array_equal(full[:count], matrix)
    assert (full[count:] == -1).all()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rows_are_spread_and_the_rest_is_whole(devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    matrix = np.arange(256 * 3).reshape(256, 3)
    placed = sharding.put_matrix(mesh, matrix)
    assert {s.data.shape for s in placed.addressable_shards} == {(256 // devices, 3)}
    np.testing.assert_array_equal(placed, matrix)
    whole = sharding.put_replicated(mesh, {"a": matrix})["a"]
    assert {s.data.shape for s in whole.addressable_shards} == {(256, 3)}


class Device:
    """Of a platform and a process that are not here."""

    def __init__(self, platform, process_index):
        self.platform, self.process_index = platform, process_index


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_groups_have_devices_of_several_processes_but_on_cpus(platform):
    devices = [Device(platform, k // 2) for k in range(8)]
    grid = sharding.make_mesh(devices, model=2).devices
    np.testing.assert_array_equal(grid, np.reshape(devices, (4, 2)))
    if platform == "cpu":
        with pytest.raises(InputError, match="the 2 devices of a process, as it has to on CPUs"):
            sharding.make_mesh(devices, model=4)
    else:
        assert sharding.make_mesh(devices, model=4).shape == {"data": 2, "model": 4}
        with pytest.raises(InputError, match="model=3 does not divide the 8 devices:"):
            sharding.make_mesh(devices, model=3)


def test_a_batch_that_does_not_spread_is_an_error():
    mesh = sharding.make_mesh(jax.devices()[:8])
    sharding.check_divides("batch_size", 64, mesh)
    with pytest.raises(ValueError, match=r"batch_size=52.*multiple of 8"):
        sharding.check_divides("batch_size", 52, mesh)
    with pytest.raises(ValueError, match="multiple of 24"):
        sharding.check_divides("batch_size", 64, mesh, parts=3)
