"""`torch.set_default_device` changes nothing: what is made beside a model is made where the model is, or on the CPU.

`meta`, on which there are no numbers, stands for any device but that of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.config.observers import OBSERVERS
from hf_qat.quantization.observers import make_observer
from hf_qat.quantization.spec import QuantizerSpec


OBSERVED = {"learned": False, "observer": "moving_average"}
CONFIGS = {
    "learned": QATConfig("w4a4"),
    "observed": QATConfig(weights=OBSERVED, activations=OBSERVED),
    "codes kept": QATConfig(save_memory=True),
}


@contextmanager
def default_device(name: str | None) -> Iterator[None]:
    """Inside, what is made without a device is on this one."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def trained(model: nn.Module, images: Tensor, effort: str) -> dict[str, Tensor]:
    """All tensors after calibration and conversion, and the gradients between."""
    calibrate(model, [images], effort=effort)
    model.train()(images).square().mean().backward()
    seen = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return seen | {**convert(model).state_dict(), "answer": model(images)}


@pytest.mark.parametrize(
    ("config", "effort"),
    [*((name, "fast") for name in CONFIGS), pytest.param("learned", "best", marks=pytest.mark.slow)],
)
def test_a_model_is_calibrated_trained_and_converted_as_without_one(config: str, effort: str):
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.Hardswish(), nn.Conv2d(4, 2, 1)
    model, images = nn.Sequential(*layers), torch.randn(8, 3, 9, 9)
    prepare_qat(model, CONFIGS[config], images)
    expected = trained(copy.deepcopy(model), images, effort)
    with default_device("meta"):
        found = trained(model, images, effort)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_keeps_its_state_on_the_cpu(observer: str):
    x = torch.tensor([-3.0, 0.2, 5.0])
    with default_device("meta"):
        made = make_observer(QuantizerSpec(signed=False, symmetric=False, observer=observer))
        made.observe(x)
        made.observe(3 * x)
        scale, zero_point = made.qparams()
    assert 0 < scale.item() < 24.01 / 255 and 0 <= zero_point.item() <= 255
