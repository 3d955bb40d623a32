"""Convolution that is fast on a CPU as well, forward and backward.

XLA's CPU backend is as fast as any at most convolutions, but not at all; other backends keep the
plain form, except for a stem's on a GPU (`space_to_depth`). Measured by
`benchmarks/convolutions.py` (2 cores, float32):

* 3x3 at stride 1, what ResNets mostly are: two by two outputs by 16 products of channels in place
  of 36 (Winograd), forward and backward, take 0.4 to 0.9 of XLA's time; on large maps of few
  channels a seventh.
* 1x1: the gradient of the kernel is 2 to 15 times slower than the matrix product it is. In that
  product in turn, XLA transposes its first operand in memory, which had better be the smaller one.
* The gradient of the input at stride 2, of which XLA makes a convolution with zeros between the
  gradients, is up to 1.6 times slower than one of each part of the kernel.
* The gradient of any other kernel is up to 2.5 times slower than matrix products of the input,
  shifted to the places of the kernel, with the output's gradient, one for each row of the kernel.
  Of few channels on small maps XLA's is the faster one, and such a convolution is left as it is.
* A 3x3 convolution on a 2x2 map, forward and backward, is a hundred times slower than the same
  number of products elsewhere (512 channels, 16 images: 550 ms instead of 5). There, and only
  there, it is a matrix product over patches.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

# Positions of the output map up to which the patches are taken; from 3x3 on XLA is as fast.
SMALL_MAP = 4
# Channels, in and out, from which Winograd's way is the faster one.
WINOGRAD = 32
# Channels up to which XLA's own gradients are the faster ones; not of as many products as LARGE.
NARROW = 64
LARGE = 2**30
# Channels of the input up to which a GPU's own convolution of stride 2 is slow: of images.
FEW = 4
# Winograd's F(2, 3), two neighbouring results of three weights by four products: with d four
# neighbouring inputs and g the weights, they are OUTPUT ((KERNEL g) * (INPUT d)).
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

Matrix = tuple[tuple[float, ...], ...]


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
    strides, padding = tuple(window_strides), tuple(map(tuple, padding))
    winograd = (
        (kh, kw, *strides) == (3, 3, 1, 1)
        and max(map(max, padding)) <= 2  # so that its gradient is another one
        and min(rhs.shape[2:]) >= WINOGRAD
        and lhs.dtype == jnp.float32  # its sums of inputs cost bits that narrower types lack
    )
    special = {}
    if kh * kw == 1 or h * w <= SMALL_MAP:
        special["cpu"] = partial(_by_patches, strides=strides, padding=padding, size=(h, w))
    elif winograd:
        special["cpu"] = partial(_winograd, padding)
    elif min(rhs.shape[2:]) > NARROW or lhs.shape[0] * h * w * rhs.size >= LARGE:
        special["cpu"] = partial(_with_own_gradients, strides, padding, tuple(options.items()))
    if rhs.shape[2] <= FEW and strides == (2, 2):
        special["cuda"] = partial(space_to_depth, padding=padding, size=(h, w), options=options)
    if not special:
        return direct(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, default=direct, **special)


def space_to_depth(
    x: jax.Array, kernel: jax.Array, *, padding: Any, size: tuple[int, int], options: Any
) -> jax.Array:
    """A convolution of stride 2 as one of stride 1, of the four pixels of each two by two as one.

    The kernel's side is made even by zeros, and its channels `FEW`, so that a pixel has 16.
    """
    kh, kw, channels, features = kernel.shape
    sides = kh + kh % 2, kw + kw % 2
    kernel = jnp.pad(kernel, ((0, kh % 2), (0, kw % 2), (0, FEW - channels), (0, 0)))
    kernel = kernel.reshape(sides[0] // 2, 2, sides[1] // 2, 2, FEW, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(sides[0] // 2, sides[1] // 2, -1, features)
    rows, columns = (  # what the kernel sees of them
        (before, 2 * (count - 1) + side - n - before, 0)
        for n, (before, _), count, side in zip(x.shape[1:3], padding, size, sides, strict=True)
    )
    widths = ((0, 0, 0), rows, columns, (0, FEW - channels, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
    b, h, w, _ = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, FEW).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, h // 2, w // 2, 4 * FEW)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", **options)


def _by_patches(
    x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Any, size: tuple[int, int]
) -> jax.Array:
    """Patches [B, h, w, kh*kw*I] times the kernel as a matrix."""
    taps = _taps(x, kernel.shape[:2], strides, padding, size)
    # Of two dimensions, as the product is: see `resnet.kept_sum`.
    patches = jnp.concatenate(taps, -1).reshape(-1, kernel[..., 0].size)
    rows = _product(patches, kernel.reshape(-1, kernel.shape[-1]))
    return rows.reshape(-1, *size, kernel.shape[-1])


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
    """x [M, I] times kernel [I, O]."""
    return x @ kernel


def _product_forward(x: jax.Array, kernel: jax.Array) -> Any:
    return x @ kernel, (x, kernel)


def _product_backward(saved: Any, grad: jax.Array) -> Any:
    x, kernel = saved
    if x.shape[1] <= grad.shape[1]:
        return grad @ kernel.T, x.T @ grad
    return grad @ kernel.T, (grad.T @ x).T


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_own_gradients(
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    options: tuple[tuple[str, Any], ...],
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """A convolution; gradients by plain convolutions (x) and by products (kernel)."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **dict(options))


def _own_forward(strides: Any, padding: Any, options: Any, x: jax.Array, kernel: jax.Array) -> Any:
    return _with_own_gradients(strides, padding, options, x, kernel), (x, kernel)


def _own_backward(
    strides: Any, padding: Any, options: Any, saved: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    x_grad = _input_gradient(grad, kernel, x.shape, strides, padding, options)
    taps = _taps(x, kernel.shape[:2], strides, padding, grad.shape[1:3])
    rows = grad.reshape(-1, grad.shape[-1])
    kw = kernel.shape[1]
    lines = [jnp.concatenate(taps[i : i + kw], -1) for i in range(0, len(taps), kw)]
    products = [(rows.T @ line.reshape(-1, line.shape[-1])).T for line in lines]
    return x_grad, jnp.stack(products).reshape(kernel.shape)


_with_own_gradients.defvjp(_own_forward, _own_backward)


def _input_gradient(
    grad: jax.Array,
    kernel: jax.Array,
    shape: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    options: Any,
) -> jax.Array:
    """Gradient [B, H, W, I] of a convolution's input from that of its output, [B, h, w, O].

    Input pixels whose places, counted with the padding, leave the same rest divided by the stride
    see the same part of the kernel: a convolution of stride 1 for each rest (there is one at stride
    1), whose results take turns in the whole.
    """
    (sh, sw), (h, w) = strides, grad.shape[1:3]
    (top, _), (left, _) = padding
    first = top // sh, left // sw
    count = (top + shape[1] - 1) // sh + 1 - first[0], (left + shape[2] - 1) // sw + 1 - first[1]
    lines = []
    for i in range(sh):
        line = []
        for j in range(sw):
            part = kernel[i::sh, j::sw]
            if not part.size:  # a kernel smaller than its stride sees nothing here
                line.append(jnp.zeros((grad.shape[0], *count, shape[3]), grad.dtype))
                continue
            turned = jnp.swapaxes(part[::-1, ::-1], 2, 3)
            zeros = [
                (places - 1 - start, number - size + start)
                for places, start, number, size in zip(
                    part.shape[:2], first, count, (h, w), strict=True
                )
            ]
            line.append(jax.lax.conv_general_dilated(grad, turned, (1, 1), zeros, **dict(options)))
        lines.append(jnp.stack(line, 3))
    whole = jnp.stack(lines, 2).reshape(shape[0], count[0] * sh, count[1] * sw, shape[3])
    top, left = top - first[0] * sh, left - first[1] * sw
    return whole[:, top : top + shape[1], left : left + shape[2]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _winograd(padding: tuple[tuple[int, int], ...], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1 of x [B, H, W, I], two by two results of it at a time.

    `INPUT`, `KERNEL` and `OUTPUT` act on rows and columns alike, so that there are 4 x 4 products.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308.
    """
    h, w = (n + sum(zeros) - 2 for n, zeros in zip(x.shape[1:3], padding, strict=True))
    products = _windows(x, padding) @ _stacked(_both_ways(KERNEL, kernel))
    tiles = (4, 4, x.shape[0], -(-h // 2), -(-w // 2), kernel.shape[3])
    results = _both_ways(OUTPUT, products.reshape(tiles))
    whole = jnp.stack([jnp.stack(line, 3) for line in results], 2)
    return whole.reshape(x.shape[0], 2 * tiles[3], 2 * tiles[4], tiles[5])[:, :h, :w]


def _winograd_forward(padding: Any, x: jax.Array, kernel: jax.Array) -> Any:
    return _winograd(padding, x, kernel), (x, kernel)


def _winograd_backward(padding: Any, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    x_grad = _winograd(tuple((2 - before, 2 - after) for before, after in padding), grad, turned)
    _, h, w, o = grad.shape
    grad = jnp.pad(grad, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    results = [[grad[:, i::2, j::2].reshape(-1, o) for j in range(2)] for i in range(2)]
    grads = _stacked(_both_ways(_transposed(OUTPUT), results))
    products = jnp.einsum("kmi,kmo->kio", _windows(x, padding), grads)
    places = _both_ways(_transposed(KERNEL), products.reshape(4, 4, *products.shape[1:]))
    return x_grad, jnp.stack([jnp.stack(line) for line in places])


_winograd.defvjp(_winograd_forward, _winograd_backward)


def _windows(x: jax.Array, padding: Any) -> jax.Array:
    """What two by two results see of x [B, H, W, I], transformed: [16, M, I] of M such windows."""
    sides = [n + before + after for n, (before, after) in zip(x.shape[1:3], padding, strict=True)]
    padding = [
        (before, after + side % 2) for side, (before, after) in zip(sides, padding, strict=True)
    ]
    taps = _taps(x, (4, 4), (2, 2), padding, [(side - 1) // 2 for side in sides])
    taps = [tap.reshape(-1, x.shape[3]) for tap in taps]
    return _stacked(_both_ways(INPUT, [taps[i : i + 4] for i in range(0, 16, 4)]))


def _stacked(blocks: Any) -> jax.Array:
    """4 x 4 of [M, I] -> [16, M, I]."""
    return jnp.stack([block for line in blocks for block in line])


def _both_ways(matrix: Matrix, blocks: Any) -> list[list[jax.Array]]:
    """matrix @ blocks @ matrix^T, where what stands at each place of `blocks` is an array."""
    lines = [[_sum(row, column) for column in zip(*blocks, strict=True)] for row in matrix]
    return [[_sum(row, line) for row in matrix] for line in lines]


def _sum(factors: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    return reduce(jnp.add, (f * array for f, array in zip(factors, arrays, strict=True) if f))


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))
