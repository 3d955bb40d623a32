"""The network in PyTorch, written from the paper for the tests to compare with.

Names of parameters are those of the authors' checkpoints and of torchvision's ResNets. Every
formula is taken literally: [B, C, P, rank] is formed, [e_c ; g] is concatenated, W_h and w_t are
applied in turn.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Residual block with two or three convolutions."""

    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        plan = (
            [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
            if bottleneck
            else [(width, 3, stride), (width, 3, 1)]
        )
        last = inputs
        for i, (features, size, s) in enumerate(plan, start=1):
            conv = nn.Conv2d(last, features, size, stride=s, padding=size // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(features))
            last = features
        self.count, self.downsample = len(plan), None
        if stride != 1 or inputs != last:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, last, 1, stride=stride, bias=False), nn.BatchNorm2d(last)
            )
        self.outputs = last

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y if i == 1 else F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet(stage_sizes, widths=(64, 128, 256, 512), bottleneck=False):
    """A ResNet without pooling and classifier, children named as torchvision names them."""
    children = nn.Sequential()
    children.add_module("conv1", nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False))
    children.add_module("bn1", nn.BatchNorm2d(widths[0]))
    children.add_module("relu", nn.ReLU())
    children.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    last = widths[0]
    for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True)):
        blocks = nn.Sequential()
        for i in range(size):
            block = Block(last, width, 2 if stage and i == 0 else 1, bottleneck)
            blocks.append(block)
            last = block.outputs
        children.add_module(f"layer{stage + 1}", blocks)
    return children


def positions(height, width, dim):
    """Sine positions [height * width, dim], entry by entry."""
    half, table = dim // 2, torch.zeros(height, width, dim)
    for y in range(height):
        for x in range(width):
            for i in range(dim):
                step, last = (y + 1, height) if i < half else (x + 1, width)
                j = i % half
                angle = step / (last + 1e-6) * 2 * math.pi / 10000 ** (2 * (j // 2) / half)
                table[y, x, i] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
    return table.reshape(height * width, dim)


class EncoderLayer(nn.Module):
    """Post-norm or pre-norm layer; positions join queries and keys."""

    def __init__(self, d, heads, mlp, norm_first):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d, mlp), nn.Linear(mlp, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.norm_first = norm_first

    def forward(self, x, pos):
        def attend(y):
            return self.self_attn(y + pos, y + pos, y, need_weights=False)[0]

        def transform(y):
            return self.linear2(F.relu(self.linear1(y)))

        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + transform(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + transform(x))


class Encoder(nn.Module):
    """Layers and an optional last norm."""

    def __init__(self, layers, d, heads, mlp, norm_first, final_norm):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d, heads, mlp, norm_first) for _ in range(layers))
        self.norm = nn.LayerNorm(d) if final_norm else None

    def forward(self, x, pos):
        for layer in self.layers:
            x = layer(x, pos)
        return x if self.norm is None else self.norm(x)


class Attention(nn.Module):
    """Low-rank bilinear attention, the direct form."""

    def __init__(self, d, s, rank):
        super().__init__()
        self.linear1 = nn.Linear(d, rank, bias=False)
        self.linear2 = nn.Linear(s, rank, bias=False)
        self.hidden_linear, self.target_linear = nn.Linear(rank, rank), nn.Linear(rank, 1)

    def forward(self, x, v):
        cross = torch.tanh(self.linear1(x)[:, None] * self.linear2(v)[:, :, None])
        return self.target_linear(self.hidden_linear(cross))[..., 0].transpose(1, 2)


class TorchCLSL(nn.Module):
    """Backbone (or none) and head in the four variants of the authors."""

    def __init__(
        self,
        variant,
        *,
        c,
        e,
        d,
        heads=4,
        mlp=24,
        layers=1,
        rank=12,
        norm_first=False,
        final_norm=False,
        use_positions=True,
        backbone=None,
    ):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.has_backbone, self.variant = backbone is not None, variant
        self.use_positions = use_positions
        if variant in ("clsl", "baseline"):
            self.fc0 = nn.Conv1d(d, c, 1)
        if variant == "baseline":
            return
        if layers:
            self.encoder = Encoder(layers, d, heads, mlp, norm_first, final_norm)
        self.encode = layers > 0
        s = e if variant == "without_srfl" else d
        self.attention2 = Attention(d, s, rank)
        self.fc2 = nn.Sequential(
            nn.Linear(s + d, s + d), nn.GELU(), nn.Dropout(0.0), nn.Linear(s + d, c)
        )
        if variant != "without_srfl":
            self.ttd = nn.Sequential(
                nn.Conv1d(e + d, e + d, 1), nn.BatchNorm1d(e + d), nn.GELU(), nn.Conv1d(e + d, d, 1)
            )

    def forward(self, inputs, embeddings):
        """Features [B, D, h, w] or images [B, 3, H, W] -> (z1, z0 or None, s [B, P, C])."""
        maps = self.backbone(inputs) if self.has_backbone else inputs
        b, d, h, w = maps.shape
        x = maps.flatten(2).transpose(1, 2)
        if self.variant == "baseline":
            s = self.fc0(x.transpose(1, 2)).transpose(1, 2)
            return (s.softmax(1) * s).sum(1), None, s
        if self.encode:
            x = self.encoder(x, positions(h, w, d) if self.use_positions else 0.0)
        c = embeddings.shape[0]
        v = embeddings.expand(b, *embeddings.shape)
        if self.variant != "without_srfl":
            mean = x.mean(1, keepdim=True).expand(b, c, d)
            v = self.ttd(torch.cat([v, mean], -1).transpose(1, 2)).transpose(1, 2)
        f = self.attention2(x, v).softmax(-1) @ v
        s = self.fc2(torch.cat([f, x], -1))
        z1 = (s.softmax(1) * s).sum(1)
        z0 = self.fc0(x.transpose(1, 2)).amax(-1) if self.variant == "clsl" else None
        return z1, z0, s
