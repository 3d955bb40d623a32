"""BatchNorm against torch.nn.BatchNorm1d, over several training passes."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from clsl_jax.models import norm
from clsl_jax.models.norm import BatchNorm, normalize_batch


def test_equals_pytorch_with_unbiased_running_variance():
    rng = np.random.default_rng(0)
    module = torch.nn.BatchNorm1d(3)
    model = BatchNorm()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 3)), train=False)
    for _ in range(3):
        x = (5.0 + 2.0 * rng.standard_normal((4, 3))).astype(np.float32)
        y, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        variables = {**variables, **updated}
        expected = module(torch.from_numpy(x)).detach()
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    statistics = variables["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], module.running_mean, rtol=1e-6)
    np.testing.assert_allclose(statistics["var"], module.running_var, rtol=1e-6)
    y = model.apply(variables, x, train=False)
    expected = module.eval()(torch.from_numpy(x)).detach()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_running_variance_by_hand():
    x = jnp.array([[0.0], [2.0]])
    model = BatchNorm()
    variables = model.init(jax.random.key(0), x, train=False)
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    # Variance of {0, 2} with one below: 2; 0.9 * 1 + 0.1 * 2.
    np.testing.assert_allclose(updated["batch_stats"]["var"], [1.1], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1], rtol=1e-6)


def test_large_mean_does_not_cancel():
    x = 1000.0 + np.random.default_rng(1).standard_normal((64, 2)).astype(np.float32)
    model = BatchNorm()
    variables = model.init(jax.random.key(0), x, train=False)
    y, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y, exact, atol=1e-3)


def test_gradients_equal_pytorchs():
    rng = np.random.default_rng(2)
    x = (3.0 + 2.0 * rng.standard_normal((4, 3, 2, 5))).astype(np.float32)
    grad = rng.standard_normal(x.shape).astype(np.float32)
    scale, bias = (rng.standard_normal(5).astype(np.float32) for _ in range(2))

    def loss(x, scale, bias):
        return jnp.sum(normalize_batch(x, scale, bias, jnp.zeros(5), 1e-5, jnp.float32)[0] * grad)

    found = jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)
    tensors = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (x, scale, bias)]
    flat = tensors[0].reshape(-1, 5)
    y = torch.nn.functional.batch_norm(flat, None, None, *tensors[1:], training=True, eps=1e-5)
    (y * torch.from_numpy(grad.astype(np.float64)).reshape(-1, 5)).sum().backward()
    for ours, tensor in zip(found, tensors, strict=True):
        np.testing.assert_allclose(ours, tensor.grad, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_keeps_the_input_as_it_came():
    x = jnp.ones((64, 8), jnp.bfloat16)
    scale = bias = jnp.ones(8)
    _, pullback = jax.vjp(
        lambda x: normalize_batch(x, scale, bias, scale, 1e-5, jnp.bfloat16)[0], x
    )
    kept = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


def test_one_pass_near_the_shift_gives_both_moments():
    # What accelerators use: the mean far from 0, the shift off by two standard deviations.
    x = 1000.0 + np.random.default_rng(3).standard_normal((64, 5, 3)).astype(np.float32)
    mean, var = norm.one_pass(jnp.asarray(x), jnp.full(3, 1002.0))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1)), rtol=1e-4)
    constant = norm.one_pass(jnp.full((4, 3), 0.1), jnp.full(3, 0.7))
    assert (np.asarray(constant[1]) >= 0).all()  # rounding must not make a square root of it NaN
