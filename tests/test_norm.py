"""BatchNorm against torch.nn.BatchNorm1d, over several training passes."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from clsl_jax.models.norm import BatchNorm


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
