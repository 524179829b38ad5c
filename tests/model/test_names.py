"""Modules and attributes of the model's own that have the names of ours, and modules exchanged afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hf_qat import calibrate, convert, fake_quant_disabled, prepare_qat
from hf_qat.errors import CaptureError, StageError
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import resnet


class OwnNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_quantizer = nn.Conv2d(3, 3, 1)
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.activation_quantizer = nn.Conv2d(4, 4, 1)
        self.add_0_quantizer = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.x_quantizer(x))
        return y + self.conv.activation_quantizer(y) * self.add_0_quantizer


@torch.no_grad()
def test_modules_that_are_named_like_quantizers_stay_and_the_quantizers_get_other_names():
    model, x = OwnNames().eval(), torch.randn(2, 3, 8, 8)
    expected, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    calibrate(prepare_qat(model, None, x), [x], bias_correction=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert {"x_quantizer_1", "conv.activation_quantizer_1", "add_0_quantizer_1"} <= fake_quantizers(model).keys()
    assert model.add_0_quantizer == 2.0
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    convert(model)
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


class Inner(nn.Module):
    """Its submodules have names of `CapturedModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.evaluation = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.evaluation(self.graph(x)))


@torch.no_grad()
def test_a_module_whose_children_have_names_of_ours_keeps_its_own_code_and_the_children_are_quantized():
    model, x = Inner().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    calibrate(prepare_qat(model, None, x), [x])
    assert {"graph.weight_quantizer", "evaluation.weight_quantizer"} <= fake_quantizers(model).keys()
    assert 0 < (model(x) - expected).norm() < 0.05 * expected.norm()


def test_a_layer_with_an_attribute_that_we_need_is_refused_by_the_name_of_the_attribute():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    model[0].weight_quantizer = nn.Identity()
    with pytest.raises(CaptureError, match=r"Conv2d has attributes of its own called weight_quantizer"):
        prepare_qat(model, None, x)
    assert type(model[0].weight_quantizer) is nn.Identity and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("exchanged", ["conv", "conv.activation_quantizer"])
def test_a_module_that_is_exchanged_after_prepare_is_named(exchanged):
    model, x = OwnNames().eval(), torch.randn(2, 3, 8, 8)
    prepare_qat(model, None, x)
    owner, _, name = exchanged.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Conv2d(3 if name == "conv" else 4, 4, 1))
    for call in (lambda: model(x), lambda: calibrate(model, [x]), lambda: convert(model)):
        with pytest.raises(StageError, match=rf"{exchanged} of OwnNames was exchanged or removed after prepare_qat"):
            call()


def test_a_head_that_is_exchanged_after_prepare_is_named():
    x = torch.randn(2, 3, 32, 32)
    model = prepare_qat(resnet(), None, x)
    model.classifier = nn.Linear(16, 3)
    with pytest.raises(
        StageError, match=r"classifier of ResNetForImageClassification was exchanged for another Linear"
    ):
        calibrate(model, [x])


def test_a_parametrization_that_is_removed_after_prepare_is_named():
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU()), torch.randn(2, 4)
    prepare_qat(model, None, x)
    parametrize.remove_parametrizations(model[0], "weight")
    with pytest.raises(StageError, match=r"0\.parametrizations\S* of Sequential was exchanged or removed"):
        model(x)
