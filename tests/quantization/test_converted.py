from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer, convert_layer
from hf_qat.quantization.layers import QATLayer, install_layer
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec
from tests.models import spread


aten = torch.ops.aten

PER_CHANNEL = QuantizerSpec(narrow_range=True, axis=0, learned=True, observer="minmax")


def source(scale: float = 0.02) -> FakeQuantize:
    made = FakeQuantize(QuantizerSpec(signed=False, non_negative=True, learned=True))
    made.set_qparams(torch.tensor(scale))
    return made


def linear(spec: QuantizerSpec = PER_CHANNEL, bias: bool = True, quantized_input: bool = True) -> QATLayer:
    layer = install_layer(spread(nn.Linear(6, 4, bias=bias)), aten.linear.default, (), spec, 0, None)
    layer.initialize_scale()
    if quantized_input:
        layer.set_input_quantizer(source())
    return layer.eval()


def transposed() -> QATLayer:
    spec = QuantizerSpec(narrow_range=True, axis=1, learned=True, observer="minmax")
    model = spread(nn.Sequential(nn.ConvTranspose2d(4, 3, 2, stride=2), nn.BatchNorm2d(3)).eval())
    layer = install_layer(model[0], aten.conv_transpose2d.input, ([2, 2],), spec, 1, model[1])
    layer.initialize_scale()
    layer.set_input_quantizer(source())
    return layer.eval()


@pytest.mark.parametrize(
    ("spec", "zero_point", "dtype"),
    [
        (QuantizerSpec(signed=False, symmetric=False, learned=True), 91.4, torch.uint8),
        (QuantizerSpec(signed=False, non_negative=True), None, torch.uint8),
        (QuantizerSpec(), None, torch.int8),
        (QuantizerSpec(bits=4, signed=False, symmetric=False), 5.0, torch.uint8),
        (QuantizerSpec(bits=16), None, torch.int16),
        (QuantizerSpec(bits=16, signed=False, symmetric=False), 40000.0, torch.uint16),
    ],
    ids=["affine", "relu", "int8", "uint4", "int16", "uint16"],
)
def test_a_converted_quantizer_computes_what_the_trained_one_did_and_what_onnx_says(spec, zero_point, dtype):
    trained = FakeQuantize(spec)
    trained.set_qparams(torch.tensor(0.037), None if zero_point is None else torch.tensor(zero_point))
    converted = QuantizeDequantize.of(trained)
    assert (converted.scale.dtype, converted.zero_point.dtype) == (torch.float32, dtype)
    assert not list(converted.parameters())
    assert set(converted.state_dict()) == {"scale", "zero_point"}
    x = torch.randn(500) * 20
    assert torch.equal(converted(x), trained(x))
    scale, zero = converted.scale.numpy(), round(zero_point or 0)
    assert converted.zero_point.item() == zero
    codes = np.clip(np.rint(x.numpy() / scale) + zero, spec.qmin, spec.qmax)
    np.testing.assert_array_equal(converted(x).numpy(), ((codes - zero) * scale).astype(np.float32))


def test_a_converted_quantizer_computes_an_activation_that_it_is_given():
    converted = QuantizeDequantize(QuantizerSpec(), torch.tensor(0.1), None)
    x = torch.linspace(-9, 9, 50)
    assert torch.equal(converted(x, "relu"), converted(torch.relu(x)))
    assert torch.equal(converted(x, "relu6"), converted(nn.functional.relu6(x)))


def test_a_converted_quantizer_describes_itself():
    made = QuantizeDequantize(QuantizerSpec(signed=False, symmetric=False), torch.tensor(0.125), torch.tensor(7.0))
    assert made.extra_repr() == "uint8, scale=0.125, zero_point=7"
    assert made.to("meta").extra_repr() == "uint8"


@pytest.mark.parametrize(
    "make",
    [linear, lambda: linear(QuantizerSpec(narrow_range=True)), transposed],
    ids=["linear", "one scale", "deconv"],
)
def test_a_converted_layer_holds_integers_and_computes_what_the_trained_one_did(make):
    layer = make()
    x = torch.rand(3, 6) if layer.weight.dim() == 2 else torch.rand(3, 4, 5, 5)
    expected = layer.compute(x).detach()
    converted = convert_layer(layer)
    assert converted is layer and isinstance(layer, QuantizedLayer) and not isinstance(layer, QATLayer)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "weight_scale", "bias_scale"}
    assert state["weight"].dtype == torch.int8 and state["bias"].dtype == torch.int32
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(layer(x), expected)


def test_codes_scales_and_bias_are_those_worked_out_by_numpy():
    layer = linear()
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    convert_layer(layer)
    scale = np.abs(weight).max(1) / 127
    np.testing.assert_allclose(layer.weight_scale.double(), scale, rtol=1e-6)
    np.testing.assert_array_equal(layer.codes.numpy(), np.rint(weight / layer.weight_scale.double().numpy()[:, None]))
    np.testing.assert_allclose(layer.bias_scale.double(), scale * 0.02, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias.numpy(), np.rint(bias / layer.bias_scale.double().numpy()))
    x = torch.rand(5, 6)
    real = layer.codes.double().numpy() * layer.weight_scale.double().numpy()[:, None]
    by_hand = x.double().numpy() @ real.T + layer.bias.double().numpy() * layer.bias_scale.double().numpy()
    np.testing.assert_allclose(layer(x), by_hand, rtol=1e-5, atol=1e-6)


def test_the_weight_of_a_converted_layer_can_be_read_in_float_by_outer_code():
    layer = linear()
    weight = layer.weight.detach().clone()
    convert_layer(layer)
    assert layer.weight.dtype == torch.float32 and layer.weight.shape == weight.shape
    step = layer.weight_scale[:, None]
    assert ((layer.weight - weight).abs() <= step / 2 * 1.001).all()
    assert layer.in_features == 6 and isinstance(layer, nn.Linear)


def test_the_axis_of_a_transposed_convolution_is_the_second():
    layer = transposed()
    folded = layer.float_weight().clone()
    convert_layer(layer)
    assert layer.weight_scale.shape == (3,)
    assert ((layer.weight - folded).abs() <= layer.weight_scale.view(1, 3, 1, 1) / 2 * 1.001).all()


def test_without_a_quantized_input_the_bias_stays_float():
    layer = linear(quantized_input=False)
    bias = layer.bias.detach().clone()
    convert_layer(layer)
    assert layer.bias_scale is None and torch.equal(layer.float_bias(), bias)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_scale"}


def test_a_layer_without_a_bias_has_none_afterwards():
    layer = linear(bias=False)
    convert_layer(layer)
    assert layer.bias is None and layer.float_bias() is None
    assert set(layer.state_dict()) == {"weight", "weight_scale"}


def test_more_than_8_bits_are_stored_in_16():
    layer = linear(QuantizerSpec(bits=16, narrow_range=True, axis=0, observer="minmax"))
    weight = layer.weight.detach().clone()
    convert_layer(layer)
    assert layer.codes.dtype == torch.int16 and layer.codes.abs().max() == 32767
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-4)


def test_four_bits_are_stored_in_8_and_stay_within_4():
    layer = linear(QuantizerSpec(bits=4, narrow_range=True, axis=0, observer="minmax"))
    convert_layer(layer)
    assert layer.codes.dtype == torch.int8 and layer.codes.abs().max() == 7


def test_a_layer_in_training_mode_is_converted_to_the_same_integers():
    one, two = linear(), linear().train()
    convert_layer(one), convert_layer(two)
    assert all(torch.equal(two.state_dict()[key], value) for key, value in one.state_dict().items())
