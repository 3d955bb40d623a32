"""ResNets without pooling, in torchvision's layout (stride on the 3x3), channels last.

Source: He et al., arXiv 1512.03385; layout and names of torchvision.models.resnet.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.convolution import conv_general_dilated
from clsl_jax.models.efficientnet import EfficientNetLite0
from clsl_jax.models.norm import BatchNorm
from clsl_jax.models.pooling import max_pool_3x3_stride_2

STAGE_SIZES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "small": (1, 1),
}
BACKBONES = (*STAGE_SIZES, "efficientnet_lite0")
BOTTLENECK = {"resnet50", "resnet101", "resnet152"}
SMALL_WIDTHS = (32, 64)


def _convolution(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    # Padding as torch has it, on both sides alike: "SAME" shifts the grid where the stride is 2.
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 to four times the width.

    Attributes:
      width: channels of the inner convolutions.
      stride: of the (first) 3x3 convolution and of the shortcut.
      bottleneck: the three-convolution form.
      dtype: compute type.
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, D] -> [B, ceil(H / stride), ceil(W / stride), width or 4 width]."""
        if self.bottleneck:
            plan = ((self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1))
        else:
            plan = ((self.width, 3, self.stride), (self.width, 3, 1))
        y = x
        for i, (features, size, stride) in enumerate(plan, start=1):
            if i > 1:
                y = nn.relu(y)
            y = _convolution(features, size, stride, self.dtype, f"conv{i}")(y)
            y = BatchNorm(dtype=self.dtype, name=f"bn{i}")(y, train=train)
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = _convolution(y.shape[-1], 1, self.stride, self.dtype, "downsample_conv")(x)
            x = BatchNorm(dtype=self.dtype, name="downsample_bn")(x, train=train)
        return jax.lax.platform_dependent(x, y, cpu=kept_sum, default=rectified_sum)


def kept_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """relu(x + y), both [..., D], in a form that XLA's CPU backend keeps in memory.

    A maximum it would compute anew wherever one is read, from the sums of all blocks before it. It
    keeps a choice between two arrays, where a matrix product reads it as it is: of two dimensions.
    """
    rows = (-1, y.shape[-1])
    total = x.reshape(rows) + y.reshape(rows)
    return jnp.where(total <= 0, 0.0, total).reshape(y.shape)  # NaN stays NaN


@jax.custom_vjp
def rectified_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """relu(x + y), both [..., D], whose gradient reads the result, which the next block keeps."""
    return nn.relu(x + y)


def _sum_forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = rectified_sum(x, y)
    return total, total


def _sum_backward(total: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Behind a barrier, or XLA takes the sign of the sum instead, for which it reads x and y again.
    grad = jnp.where(jax.lax.optimization_barrier(total) > 0, grad, 0)
    return grad, grad


rectified_sum.defvjp(_sum_forward, _sum_backward)


class ResNet(nn.Module):
    """A ResNet up to its last feature map; no pooling over positions, no classifier.

    Attributes:
      stage_sizes: blocks in each stage.
      widths: inner channels of each stage; the first is also the stem's unless `stem_width`.
      bottleneck: three-convolution blocks, which give 4 times the width.
      stem_size: side of the stem's convolution, which has stride 2 and is followed by a
        3x3 maximum with stride 2.
      stem_width: channels of the stem; 0 takes `widths[0]`.
      remat: the backward pass computes the inside of each block again instead of keeping it.
      dtype: compute type; parameters and norms are float32.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    bottleneck: bool = False
    stem_size: int = 7
    stem_width: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images [B, H, W, 3], normalised -> features [B, h, w, D] of `dtype`."""
        if len(self.stage_sizes) != len(self.widths):
            raise ValueError(
                f"ResNet: {len(self.stage_sizes)} stage sizes but {len(self.widths)} widths; "
                "give one width for each stage."
            )
        x = images.astype(self.dtype)
        stem_width = self.stem_width or self.widths[0]
        x = _convolution(stem_width, self.stem_size, 2, self.dtype, "conv1")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train=train))
        x = max_pool_3x3_stride_2(x)
        block = nn.remat(Block, static_argnums=2) if self.remat else Block
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for i in range(size):
                x = block(
                    width,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x, train)
        return x


def build_backbone(
    backbone: str,
    *,
    widths: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    remat: bool = False,
    name: str | None = None,
) -> nn.Module:
    """The network of that name: one of `BACKBONES`.

    'small' is for images of 64 pixels on a CPU: a 5x5 stem of half the first width and two stages,
    output stride 8 (a third width makes it 16).

    Args:
      backbone: one of the names above.
      widths: inner channels of each stage, instead of the named ones.
      dtype: compute type.
      remat: see `ResNet`.
      name: the module's name inside its parent.

    Raises:
      ValueError: the name is none of these, or an EfficientNet shall have other widths.
    """
    if backbone == "efficientnet_lite0":
        if widths:
            raise ValueError(f"{backbone} has widths of its own: leave them out.")
        return EfficientNetLite0(dtype=dtype, remat=remat, name=name)
    if backbone not in STAGE_SIZES:
        raise ValueError(f"unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}.")
    if backbone == "small":
        widths = tuple(widths or SMALL_WIDTHS)
        stage_sizes = (1,) * len(widths)
        stem = {"stem_size": 5, "stem_width": max(widths[0] // 2, 1)}
    else:
        widths = tuple(widths or (64, 128, 256, 512))
        stage_sizes = STAGE_SIZES[backbone]
        stem = {}
    return ResNet(
        stage_sizes=stage_sizes,
        widths=widths,
        bottleneck=backbone in BOTTLENECK,
        dtype=dtype,
        remat=remat,
        name=name,
        **stem,
    )
