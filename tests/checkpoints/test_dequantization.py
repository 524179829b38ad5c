"""Dequantized models against numpy's code × scale, and PyTorch's own batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_qat import calibrate, convert, prepare_qat
from hf_qat.checkpoints.dequantization import dequantize_
from hf_qat.checkpoints.stored_format import quantized_layers
from tests.checkpoints.damaged import RESNET, STEM, quantized


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A converted model, and the float one that it becomes."""
    converted = quantized()
    return converted, dequantize_(copy.deepcopy(converted))


def test_weights_are_codes_times_scale_and_the_class_is_that_of_the_float_model(pair: tuple[nn.Module, nn.Module]):
    converted, model = pair
    assert type(model) is type(RESNET.make()) and not quantized_layers(model)
    layers = quantized_layers(converted)
    assert len(layers) == 7
    for path, layer in layers.items():
        scale = layer.weight_scale.numpy().reshape(-1, *[1] * (layer.codes.dim() - 1))
        expected = torch.from_numpy(layer.codes.numpy() * scale)
        torch.testing.assert_close(model.get_submodule(path).weight.data, expected, rtol=0, atol=0)


def test_a_folded_batch_norm_comes_back_as_the_identity_plus_the_bias(pair: tuple[nn.Module, nn.Module]):
    converted, model = pair
    layer, norm = converted.get_submodule(STEM), model.get_submodule(STEM.replace("convolution", "normalization"))
    x = torch.randn(2, 8, 4, 4)
    bias = torch.from_numpy(layer.bias.numpy() * layer.bias_scale.numpy())
    assert bias.abs().max() > 0.01
    torch.testing.assert_close(norm(x), x + bias.float().view(1, -1, 1, 1), rtol=1e-5, atol=1e-5)


def test_it_can_be_trained_and_has_the_dtype_that_is_asked_for():
    model = dequantize_(quantized(), dtype="float16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "quantization_config") and not model.training


class LoneNorm(transformers.PreTrainedModel):
    """A batch norm without parameters that no layer precedes."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        super().__init__(config)
        self.norm, self.conv = nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(self.norm(pixel_values))


def test_a_lone_batch_norm_without_parameters_keeps_its_weight_in_its_statistics():
    float_model = LoneNorm(transformers.PreTrainedConfig()).eval()
    float_model.norm.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0]))
    float_model.norm.running_var.copy_(torch.tensor([0.25, 4.0, 9.0]))
    x = torch.randn(4, 3, 8, 8)
    converted = convert(calibrate(prepare_qat(float_model, None, x), [x]))
    layer = converted.norm
    weight = torch.from_numpy(layer.codes.numpy().reshape(3) * layer.weight_scale.detach().numpy().reshape(-1))
    torch.testing.assert_close(weight, torch.tensor([2.0, 0.5, 1 / 3]), rtol=0.01, atol=0)
    bias = torch.from_numpy(layer.bias.numpy() * layer.bias_scale.numpy()).float()
    model = dequantize_(copy.deepcopy(converted))
    expected = x * weight.view(3, 1, 1) + bias.view(3, 1, 1)
    torch.testing.assert_close(model.norm(x), expected, rtol=1e-4, atol=1e-4)
