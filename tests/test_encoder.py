"""Encoder layer against torch.nn.TransformerEncoderLayer; positions by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clsl_jax.models import pretrained
from clsl_jax.models.encoder import Encoder, sine_positions


@pytest.mark.parametrize("norm_first", [False, True])
def test_without_positions_equals_torch_transformer_encoder_layer(norm_first):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    features = np.random.default_rng(0).standard_normal((2, 3, 2, 16)).astype(np.float32)
    model = Encoder(1, 4, 24, 0.0, norm_first, positions=False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), features, train=False))
    wrapped = {"params": {"encoder": shapes["params"]}}
    state = {f"encoder.layers.0.{k}": v.detach().numpy() for k, v in layer.state_dict().items()}
    variables = pretrained.import_torch(state, wrapped)
    y = model.apply({"params": variables["params"]["encoder"]}, features, train=True)
    expected = layer(torch.from_numpy(features.reshape(2, 6, 16))).detach()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_positions_by_hand():
    table = np.asarray(sine_positions(2, 3, 4))
    assert table.shape == (2, 3, 4)
    row, column = 2 * np.pi * 1 / 2, 2 * np.pi * 2 / 3
    expected = [np.sin(row), np.cos(row), np.sin(column), np.cos(column)]
    np.testing.assert_allclose(table[0, 1], expected, atol=1e-5)


def test_positions_do_not_enter_values():
    features = jnp.broadcast_to(jnp.arange(8.0), (1, 3, 3, 8))
    model = Encoder(1, 2, 8, 0.0)
    variables = model.init(jax.random.key(0), features, train=False)
    y = model.apply(variables, features, train=False)
    # Where all positions hold the same values, weights over them do not matter.
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-5)


def test_no_layers_give_the_features_back():
    features = jnp.arange(24.0).reshape(1, 2, 3, 4)
    y, variables = Encoder(0).init_with_output(jax.random.key(0), features, train=True)
    np.testing.assert_array_equal(y, features.reshape(1, 6, 4))
    assert not variables


def test_widths_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="3 attention heads do not divide the width 8"):
        Encoder(1, 3).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)), train=False)
    with pytest.raises(ValueError, match="4 divides, not 6"):
        sine_positions(2, 2, 6)
