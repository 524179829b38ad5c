"""Plain modules as torchvision and its readers write them, each with one idea that placement and capture must get."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.coverage.case import LABELS, Case


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class Classifier(nn.Module):
    """A body, global pooling and a linear layer."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 8, stride=2)
        self.body = body
        self.head = nn.Linear(channels, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) → (N, 5)."""
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(Classifier):
    """ResNet's basic block: the sum is in place, one ReLU module serves twice."""

    def __init__(self) -> None:
        super().__init__(_Residual(), 8)


class _InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = ConvNormAct(8, 24, 1)
        self.depthwise = ConvNormAct(24, 24, groups=24)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class InvertedResidual(Classifier):
    """MobileNetV2's block: depthwise convolution, linear bottleneck."""

    def __init__(self) -> None:
        super().__init__(_InvertedResidual(), 8)


class _SqueezeExcite(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        scale = functional.relu(self.squeeze(self.pool(x)), inplace=True)
        return self.gate(self.excite(scale)) * x


class SqueezeExcite(Classifier):
    """EfficientNet's gate by channels."""

    def __init__(self) -> None:
        super().__init__(_SqueezeExcite(nn.Sigmoid()), 8)


class HardSqueezeExcite(Classifier):
    """MobileNetV3's."""

    def __init__(self) -> None:
        super().__init__(_SqueezeExcite(nn.Hardsigmoid()), 8)


class _Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(ConvNormAct(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.branch(right)), dim=1)
        batch, channels, height, width = out.shape
        return out.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)


class ChannelShuffle(Classifier):
    """ShuffleNetV2's unit: split, concatenate, shuffle by reshaping."""

    def __init__(self) -> None:
        super().__init__(_Shuffle(), 8)


class _Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = ConvNormAct(8, 4, 1)
        self.three = nn.Sequential(ConvNormAct(8, 4, 1), ConvNormAct(4, 4))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvNormAct(8, 4, 1))
        self.average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pool(x), self.average(x)], 1)


class Inception(Classifier):
    """Four branches of different range, concatenated."""

    def __init__(self) -> None:
        super().__init__(_Inception(), 20)


class _DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(functional.relu(self.norm(torch.cat(features, 1))))


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_DenseLayer(8), _DenseLayer(12), _DenseLayer(16)])
        self.norm = nn.BatchNorm2d(20)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return functional.relu(self.norm(torch.cat(features, 1)))


class Dense(Classifier):
    """DenseNet's block: batch norms before the convolutions, so that no layer can take them in."""

    def __init__(self) -> None:
        super().__init__(_Dense(), 20)


class UNet(nn.Module):
    """A feature pyramid: transposed convolution, bilinear and nearest enlargement, skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = ConvNormAct(3, 8, stride=2)
        self.down2 = ConvNormAct(8, 8, stride=2)
        self.down3 = ConvNormAct(8, 8, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)
        self.up_norm = nn.BatchNorm2d(8)
        self.lateral = nn.Conv2d(8, 8, 1)
        self.merge = ConvNormAct(16, 8)
        self.head = nn.Conv2d(8, LABELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) → (N, 5, 32, 32)."""
        fine = self.down1(x)
        middle = self.down2(fine)
        up = functional.relu(self.up_norm(self.up(self.down3(middle))))
        merged = self.merge(torch.cat([up, middle], 1))
        merged = functional.interpolate(merged, scale_factor=2.0, mode="nearest") + self.lateral(fine)
        return functional.interpolate(self.head(merged), size=x.shape[2:], mode="bilinear", align_corners=False)


class Dilated(Classifier):
    """Grouped and dilated convolutions side by side, as in an atrous pyramid."""

    def __init__(self) -> None:
        super().__init__(_Dilated(), 8)


class _Dilated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.grouped(x)) + self.act(self.dilated(x))


class SharedHead(nn.Module):
    """One head on two levels, as in RetinaNet; a dict of lists comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 8, stride=2)
        self.down = ConvNormAct(8, 8, stride=2)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.classes = nn.Conv2d(8, LABELS, 1)
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """(N, 3, 32, 32) → scores and boxes of two levels."""
        fine = self.stem(x)
        towers = [self.tower(level) for level in (fine, self.down(fine))]
        return {"scores": [self.classes(t) for t in towers], "boxes": [self.boxes(t).exp() for t in towers]}


class TwoOutputs(nn.Module):
    """A tuple comes out, one half of it from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 8, stride=2)
        self.head = nn.Conv2d(8, LABELS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 32, 32) → (N, 5, 16, 16), (N, 5)."""
        out = self.head(self.stem(x))
        return out, functional.adaptive_avg_pool2d(out, 1).flatten(1)


class Attention(nn.Module):
    """`nn.MultiheadAttention` and fused attention on patches, and a block that is normalised first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv = nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) → (N, 5)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(query, key, value)
        x = x + y.transpose(1, 2).flatten(2)
        return self.head((x + self.mlp(x)).mean(1))


CLASSES = [
    Residual,
    InvertedResidual,
    SqueezeExcite,
    HardSqueezeExcite,
    ChannelShuffle,
    Inception,
    Dense,
    UNet,
    Dilated,
    SharedHead,
    TwoOutputs,
    Attention,
]

PLAIN = [Case("Plain modules", cls, None, inputs=lambda pixels: {"x": pixels}) for cls in CLASSES]
