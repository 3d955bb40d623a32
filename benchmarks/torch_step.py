"""The network and its training step in plain PyTorch, as `benchmarks/step.py` compares with.

Written from the equations by what PyTorch offers ready-made: nn.MultiheadAttention, autocast, the
fused AdamW, torch.compile. Dropout, losses, moving average and the scattering of scores are those
of the project's own step; SGFE's attention comes as the equation reads ('direct', which keeps
[B, C, P, rank]) and with the two linear layers behind its tanh folded into one ('folded').
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

STAGE_SIZES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
FORMS = ("direct", "folded")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Residual block of two or three convolutions, the stride on the first 3x3."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        plan = [(width, 3, stride), (width, 3, 1)]
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        layers, last = [], inputs
        for features, size, step in plan:
            layers += [
                nn.Conv2d(last, features, size, step, size // 2, bias=False),
                nn.BatchNorm2d(features),
                nn.ReLU(inplace=True),
            ]
            last = features
        self.outputs, self.body = last, nn.Sequential(*layers[:-1])
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != last:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, last, 1, stride, bias=False), nn.BatchNorm2d(last)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, D, H, W]."""
        return F.relu(self.body(x) + self.shortcut(x))


def backbone(name: str) -> tuple[nn.Sequential, int]:
    """Returns a ResNet without pooling and classifier, and its width D."""
    bottleneck = name not in ("resnet18", "resnet34")
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    last = 64
    for stage, (size, width) in enumerate(zip(STAGE_SIZES[name], (64, 128, 256, 512), strict=True)):
        for i in range(size):
            block = Block(last, width, 2 if stage and not i else 1, bottleneck)
            layers.append(block)
            last = block.outputs
    return nn.Sequential(*layers), last


def sine_positions(height: int, width: int, dim: int) -> torch.Tensor:
    """2-D sine positions [height * width, dim], rows in the first half."""
    half = dim // 2
    i = torch.arange(half)
    period = 10000 ** (2 * (i // 2) / half)

    def waves(length: int) -> torch.Tensor:
        steps = torch.arange(1, length + 1) / (length + 1e-6) * 2 * math.pi
        angle = steps[:, None] / period
        return torch.where(i % 2 == 0, angle.sin(), angle.cos())

    y = waves(height)[:, None].expand(height, width, half)
    x = waves(width)[None].expand(height, width, half)
    return torch.cat([y, x], -1).reshape(height * width, dim)


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer, post-norm, with positions on queries and keys."""

    def __init__(self, d: int, heads: int = 8, mlp: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(d, mlp), nn.ReLU(), nn.Dropout(dropout), nn.Linear(mlp, d)
        )
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [B, P, D], positions [P, D]."""
        placed = x + positions
        x = self.norm1(x + self.dropout(self.attention(placed, placed, x, need_weights=False)[0]))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Attention(nn.Module):
    """a[p, c] = w_t . (W_h tanh(U x_p * V v_c) + b_h) + b_t."""

    def __init__(self, d: int, rank: int, form: str):
        super().__init__()
        self.visual = nn.Linear(d, rank, bias=False)
        self.semantic = nn.Linear(d, rank, bias=False)
        self.hidden, self.target = nn.Linear(rank, rank), nn.Linear(rank, 1)
        self.form = form

    def forward(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x [B, P, D], v [B, C, D] -> [B, P, C]."""
        cross = torch.tanh(self.visual(x)[:, None] * self.semantic(v)[:, :, None])
        if self.form == "direct":
            logits = self.target(self.hidden(cross))[..., 0]
        else:
            direction = self.target.weight @ self.hidden.weight
            constant = self.target.weight @ self.hidden.bias + self.target.bias
            logits = F.linear(cross, direction, constant)[..., 0]
        return logits.transpose(1, 2)


class Network(nn.Module):
    """Backbone, encoder, SRFL, SGFE and the global branch."""

    def __init__(self, name: str, classes: int, embedding_dim: int, rank: int, form: str):
        super().__init__()
        self.backbone, d = backbone(name)
        self.encoder = EncoderLayer(d)
        width = embedding_dim + d
        self.expand, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.reduce = nn.Linear(width, d)
        self.attention = Attention(d, rank, form)
        self.positionwise = nn.Sequential(
            nn.Linear(2 * d, 2 * d), nn.GELU(), nn.Dropout(0.5), nn.Linear(2 * d, classes)
        )
        self.globally = nn.Linear(d, classes)

    def forward(
        self, images: torch.Tensor, embeddings: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, H, W], embeddings [C, E], positions [P, D] -> z1 and z0, [B, C] float32."""
        x = self.backbone(images).flatten(2).transpose(1, 2)
        x = self.encoder(x, positions)
        b, _, d = x.shape
        c = embeddings.shape[0]
        pairs = torch.cat(
            [embeddings.expand(b, -1, -1), x.mean(1, keepdim=True).expand(b, c, d)], -1
        )
        hidden = self.norm(self.expand(pairs).flatten(0, 1)).view(b, c, -1)
        v = self.reduce(F.gelu(hidden))
        weights = self.attention(x, v).float().softmax(-1)
        s = self.positionwise(torch.cat([weights.to(v.dtype) @ v, x.to(v.dtype)], -1)).float()
        return (s.softmax(1) * s).sum(1), self.globally(x).float().amax(1)


def asymmetric_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ASL with gammas 0 and 2 and eps 1e-5, its expectation under soft targets; element-wise."""
    floor = math.log(1e-5)
    positive = -F.logsigmoid(logits).clamp(min=floor)
    negative = -F.logsigmoid(-logits).clamp(min=floor) * logits.detach().sigmoid().square()
    return targets * positive + (1 - targets) * negative


class TorchStep:
    """A training step with all it changes: call it with nothing, wait with `block`.

    Args:
      device: 'cpu' or 'cuda'.
      form: of the attention, one of `FORMS`.
      amp: autocast to bfloat16.
      channels_last: memory format of network and images.
      compiled: torch.compile of network and loss.
      ema_teacher: scores come from the moving average instead of the step's own logits.
      images: uint8 [B, H, W, 3].
      rows: [B], of the matrices.
      embeddings: float32 [C, E].
      annotations: [N, C], 1 / 0 / -1.
      rank: of the attention.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str,
        form: str,
        amp: bool,
        channels_last: bool,
        compiled: bool,
        ema_teacher: bool,
        images: torch.Tensor,
        rows: torch.Tensor,
        embeddings: torch.Tensor,
        annotations: torch.Tensor,
        rank: int,
    ):
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = Network(name, len(embeddings), embeddings.shape[1], rank, form)
        self.network = network.to(device, memory_format=layout).train()
        self.teacher = copy.deepcopy(self.network).eval().requires_grad_(False)
        side = math.ceil(images.shape[1] / 32)
        width = self.network.globally.in_features
        self.positions = sine_positions(side, side, width).to(device)
        self.device, self.layout, self.ema_teacher = device, layout, ema_teacher
        self.images, self.rows = images.to(device), rows.to(device)
        self.embeddings, self.annotations = embeddings.to(device), annotations.to(device)
        self.mean = 255 * torch.tensor(MEAN, device=device)
        self.std = 255 * torch.tensor(STD, device=device)
        shape = annotations.shape
        self.recovered = torch.full(shape, 0.25, device=device)
        self.weight = torch.full(shape, 0.5, device=device)
        self.scores = torch.zeros(shape, device=device)
        self.visits = torch.zeros(shape[0], device=device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1e-5, weight_decay=1e-4, fused=True
        )
        self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=amp)
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.taught = torch.compile(self._taught) if compiled else self._taught
        pairs = (
            (self.teacher.parameters(), self.network.parameters()),
            (self.teacher.buffers(), self.network.buffers()),
        )
        averaged = [
            (old, new)
            for olds, news in pairs
            for old, new in zip(olds, news, strict=True)
            if old.is_floating_point()
        ]
        self.averages: Sequence[Sequence[torch.Tensor]] = list(zip(*averaged, strict=True))

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.network.parameters())

    def _normalized(self) -> torch.Tensor:
        images = ((self.images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=self.layout)

    def _loss(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.autocast():
            z1, z0 = self.network(images, self.embeddings, self.positions)
        annotations = self.annotations[self.rows].float()
        known = (annotations >= 0).float()
        targets = torch.where(known > 0, annotations, self.recovered[self.rows])
        weights = self.weight[self.rows] * (1 - known)
        total = 0.0
        for logits in (z1, z0):
            losses = asymmetric_loss(logits, targets)
            total = total + (losses * known).sum() / known.sum().clamp(min=1)
            total = total + 0.8 * (losses * weights).sum() / (1 - known).sum().clamp(min=1)
        return total, z1.detach()

    def _taught(self, images: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.teacher(images, self.embeddings, self.positions)[0]

    def __call__(self) -> torch.Tensor:
        """One step; the loss before it."""
        images = self._normalized()
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self.loss(images)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            if self.ema_teacher:
                logits = self.taught(images)
            odds = 3 * F.logsigmoid(logits) - F.logsigmoid(-logits)
            visits = self.visits[self.rows, None]
            blend = 0.2 / (1 - 0.8 ** (visits + 1))
            scores = (1 - blend) * self.scores[self.rows] + blend * odds.sigmoid()
            self.scores[self.rows] = scores
            self.visits[self.rows] += 1
            torch._foreach_lerp_(self.averages[0], self.averages[1], 1 - 0.9983)
        return loss

    def block(self) -> None:
        """Waits until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()


# The modes, as options of `TorchStep`.
WAYS = {
    "eager": {"channels_last": False, "compiled": False},
    "channels_last": {"channels_last": True, "compiled": False},
    "compile": {"channels_last": False, "compiled": True},
    "compile_channels_last": {"channels_last": True, "compiled": True},
}


def model_flops(name: str, *, batch: int, image_size: int, classes: int, **sizes: int) -> float:
    """Returns the floating-point operations of a training step's products, two a multiplication.

    Of the network with SGFE's attention folded, forward and backward; nothing is computed.

    Args:
      name: of the backbone.
      batch, image_size, classes: of the step.
      sizes: `embedding_dim` and `rank`.
    """
    with torch.device("meta"):
        network = Network(name, classes, sizes["embedding_dim"], sizes["rank"], "folded")
        side = math.ceil(image_size / 32)
        positions = torch.empty(side * side, network.globally.in_features)
        images = torch.empty(batch, 3, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            z1, z0 = network(images, torch.empty(classes, sizes["embedding_dim"]), positions)
            (z1.sum() + z0.sum()).backward()
    return float(counter.get_total_flops())
