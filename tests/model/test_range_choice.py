from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.model import calibration
from hf_qat.model.range_choice import CHOICES


class Readers(nn.Module):
    """A layer that reads its input; in the other one all large values meet small weights."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 16)
        with torch.no_grad():
            nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(0))
            self.linear.weight[:, 0] *= large

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def inputs() -> Tensor:
    """Normal values, but for one column that is up to thirty times as large."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 8.0
    return x


def calibrated(large: float, x: Tensor, effort: str, **activations: Any) -> nn.Module:
    config = QATConfig(activations={"bits": 4, **activations})
    model = prepare_qat(Readers(large).eval(), config, x[:2])
    return calibrate(model, list(x.split(1024)), bias_correction=False, effort=effort)


@pytest.fixture
def no_reconstruction(monkeypatch):
    monkeypatch.setattr(calibration, "reconstruct", lambda *args, **options: {})


@pytest.mark.parametrize("large", [0.001, 1.0, 20.0], ids=["small weights", "like weights", "large weights"])
@pytest.mark.parametrize("own", CHOICES)
def test_the_range_is_that_of_the_observer_with_the_least_error_of_the_output(large, own, no_reconstruction):
    x = inputs()
    weight = Readers(large).linear.weight.detach().double()
    errors, scales = {}, {}
    for name in CHOICES:
        quantizer = calibrated(large, x, "fast", observer=name).x_quantizer
        scale, zero = quantizer.scale.detach().double(), quantizer.zero_point.detach().round().double()
        rounded = ((x.double() / scale).round() + zero).clamp(0, 15).sub(zero) * scale
        errors[name] = ((rounded - x.double()) @ weight.T).square().mean().item()
        scales[name] = quantizer.scale.item()
    best = min(errors, key=errors.__getitem__)
    assert len(set(scales.values())) == 3
    found = calibrated(large, x, "best", observer=own).x_quantizer
    assert found.scale.item() == pytest.approx(scales[best], rel=1e-5)


def test_which_observer_is_best_depends_on_the_weights(no_reconstruction):
    x = inputs()
    scales = [calibrated(large, x, "best").x_quantizer.scale.item() for large in (0.001, 20.0)]
    assert scales[1] > 1.5 * scales[0]


def test_a_range_that_no_layer_reads_is_that_of_the_recipe(no_reconstruction):
    x = inputs()
    found, expected = (calibrated(1.0, x, effort).linear.activation_quantizer for effort in ("best", "fast"))
    assert found.scale.item() == expected.scale.item()


def test_a_recipe_that_follows_ranges_keeps_its_moving_average(no_reconstruction):
    x = inputs()
    moving = {"observer": "moving_average", "learned": False}
    found, expected = (calibrated(1.0, x, effort, **moving).x_quantizer for effort in ("best", "fast"))
    assert found.scale.item() == expected.scale.item()
