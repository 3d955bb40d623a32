"""SGFE's bilinear attention in kernels of our own, for NVIDIA GPUs and bfloat16.

`alignment.in_blocks_logits` computes a tanh by an exponential, some thirty instructions with what
stands around it. These kernels take the hardware's own (`tanh.approx.f32`, to a relative error of
2^-11, at most a quarter of what bfloat16 rounds; 1 - tanh^2 to an absolute error of about 2^-10)
and keep all sums in registers; what they gain is in docs/performance.md. They are written for
Pallas's Triton backend, which jax 0.11 deprecates: a run uses them only where
`model.attention_kernel` says so.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError:  # a jax that has them no more
    pl = triton = None

# Rows of [., R] that a program keeps in registers: positions, and classes for their gradient.
ROWS = 4
_INTERPRETED = False  # set by tests: on any device, and with an exact tanh


def logits(visual: jax.Array, semantic: jax.Array, direction: jax.Array) -> jax.Array:
    """`alignment.bilinear_attention` without a gradient, [B, P, C] float32.

    Arguments are as there, in bfloat16; R is a power of two.
    """
    p, c = visual.shape[1], semantic.shape[1]
    found = _logits(_padded(visual, 1), _padded(semantic, 1), direction)
    return jnp.swapaxes(found[:, :c, :p], 1, 2)


def gradients(
    visual: jax.Array, semantic: jax.Array, direction: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `logits`, float32; `grad` is that of the logits, [B, P, C]."""
    p, c = visual.shape[1], semantic.shape[1]
    grad = _padded(jnp.swapaxes(grad, 1, 2), 1, 2)
    padded = _padded(visual, 1), _padded(semantic, 1)
    of_visual, of_semantic, of_direction = _gradients(*padded, grad)
    scale = direction.astype(jnp.float32)
    return of_visual[:, :p] * scale, of_semantic[:, :c] * scale, jnp.sum(of_direction, 0)


def _padded(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros behind axes up to a multiple of `ROWS`."""
    return jnp.pad(x, [(0, -size % ROWS if i in axes else 0) for i, size in enumerate(x.shape)])


def _by_example(rule: str) -> Callable[[Callable], Callable]:
    """Each device computes the examples it has: arrays are sharded by B alone.

    XLA cannot look into a kernel, and without this would gather the whole batch on every device.

    Args:
      rule: of the arguments and results, as Shardy writes it, with b for examples.
    """

    def decorate(function: Callable) -> Callable:
        def partition(mesh: Mesh, arguments: Any, results: Any) -> tuple:
            spec = arguments[0].sharding.spec
            batch = spec[0] if spec else None

            def where(x: Any) -> NamedSharding:
                # Only the direction, [R], has no examples.
                axes = (batch, *[None] * (x.ndim - 1)) if x.ndim > 1 else (None,)
                return NamedSharding(mesh, PartitionSpec(*axes))

            return mesh, function, jax.tree.map(where, results), jax.tree.map(where, arguments)

        partitioned = custom_partitioning(function)
        partitioned.def_partition(
            partition, sharding_rule=rule, need_replication_factors=("p", "r", "c")
        )
        return partitioned

    return decorate


@_by_example("b p r, b c r, r -> b c p")
def _logits(visual: jax.Array, semantic: jax.Array, direction: jax.Array) -> jax.Array:
    """Logits [B, C, P] float32; P and C are multiples of `ROWS`."""
    b, p, r = visual.shape
    c = semantic.shape[1]
    return _call(
        _logits_kernel,
        grid=(b, p // ROWS),
        in_specs=[
            _own_rows(r),
            _all_rows(c, r),
            pl.BlockSpec((r,), lambda i, j: (0,)),
        ],
        out_specs=_own_columns(c),
        out_shape=jax.ShapeDtypeStruct((b, c, p), jnp.float32),
    )(visual, semantic, direction)


@_by_example("b p r, b c r, b c p -> b p r, b c r, b r")
def _gradients(
    visual: jax.Array, semantic: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32: [B, P, R] and [B, C, R], to be multiplied by the direction, and its own, [B, R]."""
    b, p, r = visual.shape
    c = semantic.shape[1]
    of_visual, of_direction = _call(
        _visual_kernel,
        grid=(b, p // ROWS),
        in_specs=[
            _own_rows(r),
            _all_rows(c, r),
            _own_columns(c),
        ],
        out_specs=[
            _own_rows(r),
            pl.BlockSpec((None, None, r), lambda i, j: (i, j, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((b, p, r), jnp.float32),
            jax.ShapeDtypeStruct((b, p // ROWS, r), jnp.float32),
        ],
    )(visual, semantic, grad)
    of_semantic = _call(
        _semantic_kernel,
        grid=(b, c // ROWS),
        in_specs=[
            _all_rows(p, r),
            _own_rows(r),
            _own_rows(p),
        ],
        out_specs=_own_rows(r),
        out_shape=jax.ShapeDtypeStruct((b, c, r), jnp.float32),
    )(visual, semantic, grad)
    return of_visual, of_semantic, jnp.sum(of_direction, 1)


def _own_rows(width: int) -> Any:
    """The `ROWS` rows of an example that are a program's own, [ROWS, width]."""
    return pl.BlockSpec((None, ROWS, width), lambda i, j: (i, j, 0))


def _own_columns(height: int) -> Any:
    """The `ROWS` columns of an example that are a program's own, [height, ROWS]."""
    return pl.BlockSpec((None, height, ROWS), lambda i, j: (i, 0, j))


def _all_rows(height: int, width: int) -> Any:
    """An example's whole matrix, [height, width]."""
    return pl.BlockSpec((None, height, width), lambda i, j: (i, 0, 0))


def _call(kernel: Callable, **options: Any) -> Callable:
    """A kernel as a function of arrays, a program of 128 threads for each part of the grid."""
    parameters = triton.CompilerParams(num_warps=4, num_stages=2)
    return pl.pallas_call(
        kernel, compiler_params=parameters, interpret=_INTERPRETED, name=kernel.__name__, **options
    )


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x) if _INTERPRETED else triton.approx_tanh(x)


def _logits_kernel(visual: Any, semantic: Any, direction: Any, out: Any) -> None:
    """Logits [C, ROWS] of so many positions: a class at a time, its row of [C, R]."""
    x, w = visual[...].astype(jnp.float32), direction[...].astype(jnp.float32)

    def one_class(c: jax.Array, carry: None) -> None:
        v = semantic[c, :].astype(jnp.float32)
        out[c, :] = jnp.sum(_tanh(x * v[None]) * w[None], 1)

    jax.lax.fori_loop(0, semantic.shape[0], one_class, None)


def _visual_kernel(
    visual: Any, semantic: Any, grad: Any, of_visual: Any, of_direction: Any
) -> None:
    """Gradients of so many positions' rows, a class at a time."""
    x = visual[...].astype(jnp.float32)

    def one_class(c: jax.Array, carry: tuple) -> tuple:
        v, pull = semantic[c, :].astype(jnp.float32), grad[c, :]
        t = _tanh(x * v[None])
        rows = carry[0] + (1 - t * t) * pull[:, None] * v[None]
        return rows, carry[1] + t * pull[:, None]

    start = jnp.zeros_like(x), jnp.zeros_like(x)
    rows, products = jax.lax.fori_loop(0, semantic.shape[0], one_class, start)
    of_visual[...] = rows
    of_direction[...] = jnp.sum(products, 0)


def _semantic_kernel(visual: Any, semantic: Any, grad: Any, of_semantic: Any) -> None:
    """Gradients of so many classes' rows, a position at a time."""
    v = semantic[...].astype(jnp.float32)

    def one_position(p: jax.Array, rows: jax.Array) -> jax.Array:
        x, pull = visual[p, :].astype(jnp.float32), grad[:, p]
        t = _tanh(v * x[None])
        return rows + (1 - t * t) * pull[:, None] * x[None]

    of_semantic[...] = jax.lax.fori_loop(0, visual.shape[0], one_position, jnp.zeros_like(v))
