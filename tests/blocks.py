"""One hand-written block of each kind, small enough to work out by hand what must become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models import spread


class ConvBnRelu(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → (N, 8, 8, 8)."""
        return torch.relu(self.norm(self.conv(x)))


class DepthwiseRelu6(nn.Module):
    """Depthwise convolution, batch norm, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, 8, 8) → (N, 8, 4, 4)."""
        return functional.relu6(self.norm(self.conv(x)))


class ResidualAdd(nn.Module):
    """A ReLU'd trunk, a signed branch, and their sum, ReLU'd."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → (N, 8, 8, 8)."""
        x = torch.relu(self.trunk(x))
        return torch.relu(self.branch(x) + x)


class Sum(nn.Module):
    """A ReLU'd trunk and a signed branch meet in a sum that stays signed."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → (N, 8, 8, 8)."""
        x = torch.relu(self.trunk(x))
        return self.branch(x) + x


class Concat(nn.Module):
    """Two branches of different range, concatenated, and a layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 4, 1)
        self.large = nn.Conv2d(3, 4, 3, padding=1)
        self.behind = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → (N, 4, 8, 8)."""
        return self.behind(torch.cat([torch.relu(self.small(x)), self.large(x)], dim=1))


class SqueezeExcite(nn.Module):
    """Global pooling, two 1x1 convolutions, a sigmoid, a product by channels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, 8, 8) → the same."""
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(self.pool(x)))))


class Attention(nn.Module):
    """Two heads of scaled dot-product attention with an explicit softmax, as eager Hugging Face code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.key = nn.Linear(16, 16)
        self.value = nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, 16) → the same."""
        query, key, value = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        weights = torch.softmax(torch.matmul(query, key.transpose(2, 3)) * 8**-0.5, dim=-1)
        mixed = torch.matmul(weights, value).transpose(1, 2).reshape(x.shape)
        return self.out(mixed)


class NormMlp(nn.Module):
    """Layer norm, a GELU MLP, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, 16) → the same."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class TransposedConv(nn.Module):
    """Transposed convolution and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, 5, 5) → (N, 6, 10, 10)."""
        return self.norm(self.conv(x))


class Resize(nn.Module):
    """A convolution and a bilinear enlargement."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) → (N, 4, 12, 12)."""
        return functional.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=False)


class ConvActivation(nn.Module):
    """Convolution, batch norm, and an activation that no clamp computes."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → (N, 8, 8, 8)."""
        return self.activation(self.norm(self.conv(x)))


class Shared(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → the same."""
        return self.conv(torch.relu(self.conv(x)))


class Conv1d(nn.Module):
    """One-dimensional convolution, batch norm, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 12) → (N, 6, 12)."""
        return torch.relu(self.norm(self.conv(x)))


class Conv3d(nn.Module):
    """Three-dimensional convolution, batch norm, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, 4, 4, 4) → (N, 4, 4, 4, 4)."""
        return torch.relu(self.norm(self.conv(x)))


@dataclass(frozen=True)
class Block:
    """A block, the shape of one sample, and what must be in its exported file, worked out by hand.

    Attributes:
        make: makes the module.
        shape: of one sample, without the batch.
        pairs: Q/DQ pairs of activations.
        weights: layers, each with an int8 weight behind a `DequantizeLinear`.
        biases: of those, the ones with a bias, in int32 behind a `DequantizeLinear`.
        narrow_pairs, narrow_weights: how many of them have 4 bits on a 4-bit target: image, first layer, last layer,
            what goes into the last layer, and output keep 8.
        quantizers: fake quantizers of activations; a concatenation and what it joins have one, and several pairs.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    pairs: int
    weights: int
    biases: int
    narrow_pairs: int = 0
    narrow_weights: int = 0
    quantizers: int | None = None

    def module(self) -> nn.Module:
        """The block in evaluation mode, spread."""
        return spread(self.make()).eval()

    def data(self, batch: int, seed: int = 0) -> Tensor:
        """(batch, *shape) float32."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed))


BLOCKS = {
    # image, ReLU
    "conv_bn_relu": Block(ConvBnRelu, (3, 8, 8), pairs=2, weights=1, biases=1),
    "conv1d_bn_relu": Block(Conv1d, (3, 12), pairs=2, weights=1, biases=1),
    "conv3d_bn_relu": Block(Conv3d, (2, 4, 4, 4), pairs=2, weights=1, biases=1),
    "depthwise_relu6": Block(DepthwiseRelu6, (8, 8, 8), pairs=2, weights=1, biases=1),
    "conv_bn_hardswish": Block(lambda: ConvActivation(nn.Hardswish()), (3, 8, 8), pairs=2, weights=1, biases=1),
    "conv_bn_silu": Block(lambda: ConvActivation(nn.SiLU()), (3, 8, 8), pairs=2, weights=1, biases=1),
    "transposed_conv_bn": Block(TransposedConv, (4, 5, 5), pairs=2, weights=1, biases=1),
    # image, trunk, branch (narrow), sum
    "residual_add_relu": Block(ResidualAdd, (3, 8, 8), pairs=4, weights=2, biases=2, narrow_pairs=1),
    "residual_add": Block(Sum, (3, 8, 8), pairs=4, weights=2, biases=2, narrow_pairs=1),
    # image, two branches and their concatenation, output; the second branch's weight is narrow
    "concat": Block(Concat, (3, 8, 8), pairs=5, weights=3, biases=3, narrow_weights=1, quantizers=3),
    # image, pool (narrow), squeeze, excite (narrow), sigmoid (narrow), product
    "squeeze_excite": Block(SqueezeExcite, (8, 8, 8), pairs=6, weights=2, biases=2, narrow_pairs=3),
    # input, query, key, value, first product, softmax (all five narrow), second product, output
    "attention": Block(Attention, (6, 16), pairs=8, weights=4, biases=4, narrow_pairs=5, narrow_weights=2),
    # input, norm (narrow), up (narrow), GELU, down (narrow), sum
    "norm_gelu_mlp": Block(NormMlp, (6, 16), pairs=6, weights=2, biases=2, narrow_pairs=3),
    # image, convolution (narrow), resize
    "bilinear_resize": Block(Resize, (3, 6, 6), pairs=3, weights=1, biases=1, narrow_pairs=1),
    # image, ReLU of the first call, second call; one weight, and one bias that stays float
    "shared_conv": Block(Shared, (3, 8, 8), pairs=3, weights=1, biases=0),
}
