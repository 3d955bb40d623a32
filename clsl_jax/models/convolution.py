"""Convolution that is fast on a CPU as well, forward and backward.

XLA's CPU backend is as fast as any at most convolutions, but not at all; other backends keep the
plain form. Measured by `benchmarks/convolutions.py` (2 cores, float32):

* 1x1: the gradient of the kernel is 2 to 15 times slower than the matrix product it is. In that
  product in turn, XLA transposes its first operand in memory, which had better be the smaller one.
* The gradient of the input at stride 1 is 1.2 times slower than the same convolution, that of the
  output's gradient with the turned kernel, asked for outright.
* The gradient of a 3x3 kernel at stride 1 is up to 2.5 times faster as nine matrix products, of the
  input shifted to each place of the kernel with the output's gradient. Of 64 channels and fewer it
  is up to 3 times slower, and such a convolution is left as it is.
* A 3x3 convolution on a 2x2 map, forward and backward, is a hundred times slower than the same
  number of products elsewhere (512 channels, 16 images: 550 ms instead of 5). There, and only
  there, it is a matrix product over patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Positions of the output map up to which the patches are taken; from 3x3 on XLA is as fast.
SMALL_MAP = 4
# Channels up to which XLA's own gradients of a stride-1 convolution are the faster ones.
NARROW = 64


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
    if kh * kw == 1 or h * w <= SMALL_MAP:
        on_cpu = partial(_by_patches, strides=window_strides, padding=padding, size=(h, w))
    elif tuple(window_strides) == (1, 1) and min(rhs.shape[2:]) > NARROW:
        on_cpu = partial(_with_turned_kernel, tuple(map(tuple, padding)), tuple(options.items()))
    else:
        return direct(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=direct)


def _by_patches(
    x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Any, size: tuple[int, int]
) -> jax.Array:
    """Patches [B, h, w, kh*kw*I] times the kernel as a matrix."""
    taps = _taps(x, kernel.shape[:2], strides, padding, size)
    return _product(jnp.concatenate(taps, -1), kernel.reshape(-1, kernel.shape[-1]))


def _taps(
    x: jax.Array,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: Any,
    size: Sequence[int],
) -> list[jax.Array]:
    """What each place of a kernel sees, row by row: [B, h, w, I] each."""
    (kh, kw), (h, w), (sh, sw) = kernel_size, size, strides
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return [
        x[:, i : i + sh * (h - 1) + 1 : sh, j : j + sw * (w - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, h, w, I] times kernel [I, O]."""
    return x @ kernel


def _product_forward(x: jax.Array, kernel: jax.Array) -> Any:
    return x @ kernel, (x, kernel)


def _product_backward(saved: Any, grad: jax.Array) -> Any:
    x, kernel = saved
    rows, grad_rows = (y.reshape(-1, y.shape[-1]) for y in (x, grad))
    if x.shape[-1] <= grad.shape[-1]:
        return grad @ kernel.T, rows.T @ grad_rows
    return grad @ kernel.T, (grad_rows.T @ rows).T


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_turned_kernel(
    padding: tuple[tuple[int, int], ...],
    options: tuple[tuple[str, Any], ...],
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """A convolution of stride 1; gradients by a plain convolution (x) and by products (kernel)."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, **dict(options))


def _turned_forward(padding: Any, options: Any, x: jax.Array, kernel: jax.Array) -> Any:
    return _with_turned_kernel(padding, options, x, kernel), (x, kernel)


def _turned_backward(padding: Any, options: Any, saved: Any, grad: jax.Array) -> Any:
    x, kernel = saved
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    # So many zeros that the result has the size of x, however uneven those of the forward pass.
    zeros = [
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(kernel.shape[:2], padding, strict=True)
    ]
    x_grad = jax.lax.conv_general_dilated(grad, turned, (1, 1), zeros, **dict(options))
    rows = grad.reshape(-1, grad.shape[-1])
    taps = _taps(x, kernel.shape[:2], (1, 1), padding, grad.shape[1:3])
    products = [tap.reshape(-1, tap.shape[-1]).T @ rows for tap in taps]
    kernel_grad = jnp.stack(products).reshape(kernel.shape)
    return x_grad, kernel_grad


_with_turned_kernel.defvjp(_turned_forward, _turned_backward)
