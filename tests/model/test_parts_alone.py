"""Parts of a prepared model that are called by themselves, as an autoencoder's or a backbone's are for features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import calibrate, convert, fake_quant_disabled, freeze_batch_norm, prepare_qat


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.down_norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 4, 2, 2, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 1)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.down_norm(self.down(x)))

    def decode(self, code: Tensor) -> Tensor:
        return self.last(torch.relu(self.up_norm(self.up(code))))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def trained() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder()
    for _ in range(10):
        model(5 * torch.randn(16, 3, 8, 8) + 2)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_parts_called_alone_compute_in_float_what_those_of_the_float_model_do(training, frozen):
    model, float_model = trained(), trained()
    freeze_batch_norm(prepare_qat(model, example_inputs=X), frozen).train(training)
    float_model.train(training and not frozen)
    with fake_quant_disabled(model):
        code, expected = model.encode(X), float_model.encode(X)
        torch.testing.assert_close(code, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.decode(code), float_model.decode(expected), rtol=1e-4, atol=1e-4)
    for name, value in float_model.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), value, msg=name)


@torch.no_grad()
def test_with_their_weights_rounded_they_are_near_that_and_converted_ones_too():
    float_model, model = trained().eval(), trained()
    calibrate(prepare_qat(model, example_inputs=X), [X]).eval()
    for quantized in (model, convert(copy.deepcopy(model))):
        error = quantized.encode(X) - float_model.encode(X)
        assert error.square().mean() < 1e-3 * float_model.encode(X).square().mean()


def test_the_weight_of_a_part_called_alone_gets_its_gradient():
    model = trained()
    calibrate(prepare_qat(model, example_inputs=X), [X]).train()
    model.encode(X).square().sum().backward()
    for parameter in (model.down.weight, model.down_norm.weight, model.down_norm.bias):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
