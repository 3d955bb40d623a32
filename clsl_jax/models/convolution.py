"""Convolution that stays fast on a CPU where the map has shrunk to almost nothing.

XLA's CPU backend computes a 3x3 convolution on a 2x2 map, forward and backward, a hundred times
slower than the same number of products elsewhere (512 channels, 16 images, 2 cores: 550 ms instead
of 5). There, and only there, it is a matrix product over patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Positions of the output map up to which the patches are taken; from 3x3 on XLA is as fast.
SMALL_MAP = 4


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Stand-in for `jax.lax.conv_general_dilated` as `flax.linen.Conv` calls it.

    Args:
      lhs: input [B, H, W, I].
      rhs: kernel [kh, kw, I, O].
      window_strides: strides (sh, sw).
      padding: zeros before and after, ((top, bottom), (left, right)).
      options: passed on; dilation and groups must be 1 and the layout Flax's own.

    Returns:
      [B, h, w, O].
    """
    kh, kw, _, _ = rhs.shape
    (top, bottom), (left, right) = padding
    h = (lhs.shape[1] + top + bottom - kh) // window_strides[0] + 1
    w = (lhs.shape[2] + left + right - kw) // window_strides[1] + 1
    direct = partial(
        jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    if kh * kw == 1 or h * w > SMALL_MAP:
        return direct(lhs, rhs)
    patches = partial(_by_patches, strides=window_strides, padding=padding, size=(h, w))
    return jax.lax.platform_dependent(lhs, rhs, cpu=patches, default=direct)


def _by_patches(
    x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Any, size: tuple[int, int]
) -> jax.Array:
    """Patches [B, h, w, kh*kw*I] times the kernel as a matrix."""
    kh, kw, _, o = kernel.shape
    (h, w), (sh, sw) = size, strides
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    taps = [
        x[:, i : i + sh * (h - 1) + 1 : sh, j : j + sw * (w - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(taps, -1) @ kernel.reshape(-1, o)
