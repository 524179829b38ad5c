"""A float net that loses little in eight bits, and data for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import spread


class ThreeLayers(nn.Module):
    """Two convolutions with ReLU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 12, 12) → (N, 4)."""
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


def without_dead_channels(model: nn.Module) -> nn.Module:
    """Biases so high that every ReLU lets something through."""
    with torch.no_grad():
        model.first.bias.fill_(0.5)
        model.second.bias.fill_(2.0)
    return model


@pytest.fixture
def float_model() -> nn.Module:
    return without_dead_channels(spread(ThreeLayers())).eval()


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(3, 8, 3, 12, 12, generator=torch.Generator().manual_seed(7)))
