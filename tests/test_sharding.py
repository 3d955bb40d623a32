"""Meshes and placement."""

import jax
import numpy as np
import pytest

from clsl_jax import sharding


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


def test_a_batch_that_does_not_spread_is_an_error():
    mesh = sharding.make_mesh(jax.devices()[:8])
    sharding.check_divides("batch_size", 64, mesh)
    with pytest.raises(ValueError, match=r"batch_size=52.*multiple of 8"):
        sharding.check_divides("batch_size", 52, mesh)
    with pytest.raises(ValueError, match="multiple of 24"):
        sharding.check_divides("batch_size", 64, mesh, parts=3)
