"""Random modules: whatever channels are shared out, in float the model computes what it did."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, fake_quant_disabled, prepare_qat
from hf_qat.model import equalization
from hf_qat.model.equalization import equalize


CHANNELS = 4

#: Tensors have three or four axes, most of them of CHANNELS values: a factor along the wrong one shows.
STEPS: list[Callable[[Tensor], Tensor]] = [
    lambda y: y.transpose(-1, -2),
    lambda y: y.transpose(1, 2),
    lambda y: y.permute(0, 3, 1, 2) if y.dim() == 4 else y.permute(0, 2, 1),
    lambda y: y.permute(0, 2, 3, 1) if y.dim() == 4 else y,
    lambda y: y.reshape(len(y), -1, y.shape[-1]),
    lambda y: y.reshape(len(y), CHANNELS, -1),
    lambda y: y.reshape(len(y), -1, CHANNELS, CHANNELS),
    lambda y: y.roll(1, 1),
    lambda y: y.roll(1, -1),
    lambda y: y.roll((1, 1), (-1, -2)),
    lambda y: y[:, 1:],
    lambda y: y[:, :, :2],
    lambda y: functional.pad(y, (0, 0, 1, 0)),
    lambda y: functional.pad(y, (1, -1)),
    lambda y: functional.pad(y, (0, 0, 0, 0, 1, -1)) if y.dim() == 4 else y,
    lambda y: functional.max_pool2d(y, 3, 1, 1) if y.dim() == 4 else functional.max_pool1d(y, 3, 1, 1),
    lambda y: functional.avg_pool2d(y, 3, 1, 1) if y.dim() == 4 else functional.avg_pool1d(y, 3, 1, 1),
    torch.relu,
    lambda y: functional.leaky_relu(y, 0.1),
    lambda y: y + torch.relu(y),
    lambda y: y * 2,
    lambda y: y + 1,
]


class RandomModule(nn.Module):
    """A layer or a layer norm, up to four steps, and a layer along the last axis or along the channels of maps."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        makers = [nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)]
        self.first = draw.choice(makers)
        self.steps = draw.choices(STEPS, k=draw.randint(0, 4))
        maps = isinstance(self.first, nn.Conv2d) or draw.random() < 0.5
        self.example = torch.randn(2, *[CHANNELS] * (3 if maps else 2))
        shape = self.between(self.example).shape
        convolution = {3: nn.Conv1d, 4: nn.Conv2d}[len(shape)]
        self.last = nn.Linear(shape[-1], 3) if draw.random() < 0.5 else convolution(shape[1], 3, 1)
        for parameter in self.first.parameters():
            nn.init.normal_(parameter)

    def between(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for step in self.steps:
            y = step(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(x))


def any_factors(noise: equalization._Noise) -> Tensor:
    """Not those with the least noise: where none is needed, they are 1."""
    factors = torch.exp2(torch.randn(len(noise.power), generator=torch.Generator().manual_seed(0)))
    return torch.where(noise.most == 0.0, 1.0, factors)


def module_of(seed: int) -> RandomModule | None:
    """`None` where the steps do not fit together."""
    torch.manual_seed(seed)
    try:
        return RandomModule(random.Random(seed)).eval()
    except (RuntimeError, IndexError):
        return None


#: Of these, the last layer takes factors.
SHARED_OUT = (5, 12, 15, 18, 19, 23, 28, 30, 32, 33)

#: Of these, it takes none.
OTHERS = (0, 1, 2, 3, 4, 6, 7, 8)


@pytest.mark.parametrize(
    "seed", [*SHARED_OUT, *OTHERS, *(pytest.param(k, marks=pytest.mark.slow) for k in range(34, 250))]
)
def test_in_float_a_module_computes_what_it_did(monkeypatch: pytest.MonkeyPatch, seed: int):
    monkeypatch.setattr(equalization._Noise, "least", any_factors)
    model = module_of(seed)
    if model is None:
        pytest.skip("the steps do not fit together")
    x = model.example
    with torch.no_grad():
        expected = model(x)
    prepared = prepare_qat(model, QATConfig(), x).eval()
    assert equalize(prepared, [x]) > 0 or seed not in SHARED_OUT
    with torch.no_grad(), fake_quant_disabled(prepared):
        torch.testing.assert_close(prepared(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
