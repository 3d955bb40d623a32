"""The CPU's own ways of convolving: values and gradients against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clsl_jax.models import convolution

CASES = [
    # (height, width, kernel height, kernel width, stride, padding)
    (6, 5, 1, 1, 1, ((0, 0), (0, 0))),
    (7, 6, 1, 1, 2, ((0, 0), (0, 0))),
    (5, 5, 1, 1, 1, ((1, 0), (0, 2))),
    (6, 5, 3, 3, 1, ((1, 1), (1, 1))),
    (7, 6, 3, 3, 2, ((1, 1), (1, 1))),
    (9, 8, 5, 3, 1, ((2, 1), (0, 2))),
    (5, 6, 2, 3, 1, ((0, 1), (4, 3))),
    (12, 12, 7, 7, 2, ((3, 3), (3, 3))),
    (2, 2, 3, 3, 1, ((1, 1), (1, 1))),
    (9, 11, 3, 3, 2, ((1, 1), (1, 1))),
    (10, 9, 3, 2, 2, ((0, 1), (2, 0))),
    (11, 12, 2, 4, 3, ((2, 0), (1, 3))),
    (5, 8, 3, 3, 1, ((0, 0), (0, 0))),
    (6, 7, 3, 3, 1, ((2, 1), (0, 2))),
    (6, 5, 3, 3, 1, ((3, 0), (1, 1))),
]


@pytest.fixture(params=["few channels", "large", "many channels", "Winograd"])
def size(request, monkeypatch):
    """Has small arrays go the way of larger ones."""
    if request.param == "Winograd":
        monkeypatch.setattr(convolution, "WINOGRAD", 1)
    if request.param == "large":
        monkeypatch.setattr(convolution, "LARGE", 1)
    if request.param == "many channels":
        monkeypatch.setattr(convolution, "NARROW", 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_xla_in_value_and_gradients(case, dtype, size):
    height, width, kh, kw, stride, padding = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, height, width, 3)), dtype)
    kernel = jnp.asarray(rng.standard_normal((kh, kw, 3, 4)), dtype)

    @jax.jit
    def both(x, kernel):
        found = []
        for function in (convolution.conv_general_dilated, jax.lax.conv_general_dilated):

            def convolve(x, kernel, function=function):
                options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
                return function(x, kernel, (stride, stride), padding, **options)

            y, pull = jax.vjp(convolve, x, kernel)
            found.append((y, *pull(jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape))))
        return found

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for ours, plain in zip(*both(x, kernel), strict=True):
        assert ours.dtype == plain.dtype == dtype
        scale = float(jnp.abs(plain.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=0, atol=tolerance * scale
        )


def test_every_way_is_differentiated_once_more(size):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 5, 2)), jnp.float32)
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 2, 2)), jnp.float32)

    def penalty(kernel, function):
        def value(x):
            options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            return jnp.sum(jnp.sin(function(x, kernel, (1, 1), ((1, 1), (1, 1)), **options)))

        return jnp.sum(jnp.square(jax.grad(value)(x)))

    ours, plain = (
        jax.grad(penalty)(kernel, function)
        for function in (convolution.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_winograd_is_as_exact_as_the_plain_sum():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 14, 13, 96)), rng.standard_normal((3, 3, 96, 64))
    grad = rng.standard_normal((2, 14, 13, 64))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + 14, j : j + 13] for i in range(3) for j in range(3)]
    exact = sum(tap @ k for tap, k in zip(taps, kernel.reshape(9, 96, 64), strict=True))
    exact_grad = np.reshape([np.einsum("bhwi,bhwo->io", tap, grad) for tap in taps], kernel.shape)

    def errors(function):
        def convolve(kernel):
            options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            return function(jnp.float32(x), kernel, (1, 1), ((1, 1), (1, 1)), **options)

        y, pull = jax.vjp(convolve, jnp.float32(kernel))
        found = [np.asarray(a, np.float64) for a in (y, *pull(jnp.float32(grad)))]
        return np.array([np.std(found[0] - exact), np.std(found[1] - exact_grad)])

    ours = errors(convolution.conv_general_dilated)
    plain = errors(jax.lax.conv_general_dilated)
    assert (ours > 0).all()
    assert (ours < 1.5 * plain).all()
    assert (ours != plain).all()  # it did go another way
