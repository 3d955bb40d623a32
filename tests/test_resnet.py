"""Backbones: shapes, padding as in torch, and the convolution for tiny maps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_clsl import resnet

from clsl_jax.models import convolution, pretrained
from clsl_jax.models.pooling import max_pool_3x3_stride_2
from clsl_jax.models.resnet import (
    STAGE_SIZES,
    ResNet,
    build_backbone,
    kept_sum,
    rectified_sum,
)


@pytest.fixture(autouse=True)
def same_weights():
    """PyTorch's own first seed is another one in every process."""
    torch.manual_seed(0)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("size", [(33, 48), (64, 31)])
def test_equals_pytorch_at_any_size(bottleneck, size):
    sizes, widths = (1, 2, 1, 1), (8, 8, 12, 16)
    module = resnet(sizes, widths, bottleneck).eval()
    images = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
    model = ResNet(sizes, widths, bottleneck)
    inputs = images.transpose(0, 2, 3, 1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    variables = pretrained.import_torch(state, shapes)
    features = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, inputs)
    expected = module(torch.from_numpy(images)).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "widths", "grid", "features"),
    [
        ("small", None, 8, 64),
        ("small", (8, 16, 24), 4, 24),
        ("resnet18", None, 2, 512),
        ("resnet34", None, 2, 512),
        ("resnet50", None, 2, 2048),
        ("resnet152", None, 2, 2048),
    ],
)
def test_output_shapes_at_64_pixels(name, widths, grid, features):
    model = build_backbone(name, widths=widths)
    out, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    assert out.shape == (1, grid, grid, features)
    if name != "small":
        blocks = [name for name in variables["params"] if name.startswith("layer")]
        assert len(blocks) == sum(STAGE_SIZES[name])


def test_widths_and_stage_sizes_must_agree():
    with pytest.raises(ValueError, match="2 stage sizes but 4 widths"):
        ResNet((1, 1)).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)


@pytest.mark.parametrize(("side", "stride"), [(2, 1), (4, 2), (3, 2), (1, 1), (7, 1)])
def test_tiny_maps_give_the_same_convolution_and_gradients(side, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, side, side, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 4)), jnp.float32)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    results = []
    for function in (convolution.conv_general_dilated, jax.lax.conv_general_dilated):
        y, pull = jax.vjp(
            lambda x, k, f=function: f(x, k, (stride, stride), ((1, 1), (1, 1)), **options),
            x,
            kernel,
        )
        results.append((y, *pull(jnp.cos(y))))
    for ours, plain in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 48), (64, 31)])
@pytest.mark.parametrize(("side", "channels"), [(7, 3), (5, 1), (4, 4), (3, 2)])
def test_pixels_taken_four_at_a_time_give_the_same_convolution_and_gradients(size, side, channels):
    # What a GPU does with a stem, on the CPU.
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, *size, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((side, side, channels, 6)), jnp.float32)
    padding, options = ((side // 2,) * 2,) * 2, {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    results = []
    plain = partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding=padding, **options)
    shape = plain(x, kernel).shape[1:3]
    ours = partial(convolution.space_to_depth, padding=padding, size=shape, options=options)
    for function in (ours, plain):
        y, pull = jax.vjp(function, x, kernel)
        results.append((y, *pull(jnp.cos(y))))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(7, 10), (8, 9)])
def test_max_pool_and_its_gradient_equal_pytorchs(size):
    x = np.random.default_rng(3).standard_normal((2, *size, 3)).astype(np.float32)
    y, pull = jax.vjp(max_pool_3x3_stride_2, jnp.asarray(x))
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    expected = torch.nn.functional.max_pool2d(tensor, 3, 2, 1)
    np.testing.assert_array_equal(y, expected.detach().permute(0, 2, 3, 1))
    expected.cos().sum().backward()
    (grad,) = pull(-jnp.sin(y))
    np.testing.assert_allclose(grad, tensor.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_the_rectified_sum_of_accelerators():
    x = jnp.asarray([1.0, 0.0, 3.0, jnp.nan])
    y = jnp.asarray([1.0, 0.0, -5.0, 1.0])
    np.testing.assert_array_equal(rectified_sum(x, y), [2.0, 0.0, 0.0, np.nan])
    grads = jax.grad(lambda x, y: jnp.sum(rectified_sum(x, y)[:3]), (0, 1))(x, y)
    np.testing.assert_array_equal(grads, [[1.0, 0.0, 0.0, 0.0]] * 2)


def test_a_sum_kept_in_memory_is_the_rectified_sum():
    x = jnp.asarray([[[1.0, -2.0]], [[0.0, jnp.nan]], [[3.0, -jnp.inf]]])
    y = jnp.asarray([[[1.0, 1.0]], [[0.0, 1.0]], [[-5.0, 1.0]]])
    np.testing.assert_array_equal(kept_sum(x, y), [[[2.0, 0.0]], [[0.0, np.nan]], [[0.0, 0.0]]])
    ours = jax.grad(lambda x: jnp.sum(kept_sum(x, y) * jnp.arange(1.0, 7.0).reshape(x.shape)))(x)
    assert ours[0, 0, 0] == 1.0
    assert ours[0, 0, 1] == ours[1, 0, 0] == ours[2, 0, 0] == ours[2, 0, 1] == 0.0


def test_no_block_computes_the_sum_of_another_one_anew():
    """In a chain of blocks, what XLA reads for a block's sum must not grow with its place."""
    model = ResNet((6,), (8,), bottleneck=True)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    apply = jax.jit(lambda variables: model.apply(variables, images, train=False))
    program = apply.lower(variables).compile().as_text()
    reads = [line.count("bn3") for line in program.splitlines() if "fusion(" in line]
    assert max(reads) <= 4  # scale, bias, mean and variance of one norm
    assert sum(reads) >= 6
