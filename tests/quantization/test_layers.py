from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat.quantization.freezable_norm import FreezableBatchNorm, install_freezable_norm
from hf_qat.quantization.layers import QATLayer, install_layer, qat_layers
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec
from tests.models import spread


aten = torch.ops.aten

PER_CHANNEL = QuantizerSpec(narrow_range=True, axis=0, learned=True, observer="minmax")
PER_TENSOR = QuantizerSpec(narrow_range=True, learned=True, observer="minmax")
SPECS = {"per channel": PER_CHANNEL, "per tensor": PER_TENSOR}


class ConvNorm(nn.Module):
    """A convolution with a bias and its batch norm, one gamma of which is negative."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        spread(self)
        with torch.no_grad():
            self.norm.weight[1] *= -1

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def installed(spec: QuantizerSpec = PER_CHANNEL, bias: bool = True) -> tuple[QATLayer, nn.BatchNorm2d]:
    model = ConvNorm(bias)
    layer = install_layer(model.conv, aten.conv2d.default, ([1, 1], [1, 1]), spec, 0, model.norm)
    layer.initialize_scale()
    return layer, model.norm


def linear(spec: QuantizerSpec = PER_CHANNEL, bias: bool = True) -> QATLayer:
    layer = install_layer(spread(nn.Linear(6, 4, bias=bias)), aten.linear.default, (), spec, 0, None)
    layer.initialize_scale()
    return layer


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def factor_by_hand(norm: nn.BatchNorm2d) -> np.ndarray:
    return numbers(norm.weight) / np.sqrt(numbers(norm.running_var) + norm.eps)


def quantized_by_hand(weight: np.ndarray, per_channel: bool) -> np.ndarray:
    """Rounded to 127 steps of the largest magnitude."""
    largest = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True) if per_channel else np.abs(weight).max()
    return np.rint(weight / (largest / 127)) * (largest / 127)


def assert_nearly_all_close(result: np.ndarray, expected: np.ndarray, step: float) -> None:
    """Equal but for a few near ties, which float32 and float64 round to different sides."""
    different = np.abs(result - expected) > 1e-5 * np.abs(expected).max()
    assert different.mean() < 0.02
    assert np.abs(result - expected).max() <= step


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_weight_on_the_device_is_the_rounded_folded_weight(spec):
    layer, norm = installed(spec)
    folded = numbers(layer.weight) * factor_by_hand(norm)[:, None, None, None]
    expected = quantized_by_hand(folded, spec.axis is not None)
    weight, bias = layer.eval().folded(layer.weight_quantizer.scale)
    assert_nearly_all_close(numbers(weight), expected, np.abs(folded).max() / 127 * 1.01)
    by_hand = numbers(norm.bias) + (numbers(layer.bias) - numbers(norm.running_mean)) * factor_by_hand(norm)
    np.testing.assert_allclose(numbers(bias), by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numbers(layer.float_weight()), folded, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_with_batch_norm_frozen_one_convolution_computes_it_all(bias):
    layer, norm = installed(bias=bias)
    layer.batch_norm_frozen = True
    layer.train(), norm.train()
    statistics = copy.deepcopy(norm.state_dict())
    x = torch.randn(5, 3, 6, 6)
    weight = quantized_by_hand(numbers(layer.weight) * factor_by_hand(norm)[:, None, None, None], True)
    shift = -numbers(norm.running_mean) + (numbers(layer.bias) if bias else 0.0)
    offset = numbers(norm.bias) + shift * factor_by_hand(norm)
    expected = nn.functional.conv2d(x.double(), torch.from_numpy(weight), torch.from_numpy(offset), padding=1)
    torch.testing.assert_close(layer.compute(x).double(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert all(torch.equal(value, statistics[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_with_batch_norm_live_its_own_statistics_normalize_the_quantized_convolution(spec):
    layer, norm = installed(spec)
    layer.train(), norm.train()
    x = torch.randn(5, 3, 6, 6)
    factor = factor_by_hand(norm)[:, None, None, None]
    weight = torch.from_numpy(quantized_by_hand(numbers(layer.weight) * factor, spec.axis is not None) / factor)
    raw = nn.functional.conv2d(x.double(), weight, layer.bias.detach().double(), padding=1)
    mean, variance = raw.mean((0, 2, 3)), raw.var((0, 2, 3), unbiased=False)
    expected = (raw - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
    expected = expected * norm.weight.detach().double()[:, None, None] + norm.bias.detach().double()[:, None, None]
    running_mean = 0.9 * norm.running_mean.double() + 0.1 * mean
    running_var = 0.9 * norm.running_var.double() + 0.1 * raw.var((0, 2, 3), unbiased=True)
    torch.testing.assert_close(layer.compute(x).double(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    torch.testing.assert_close(norm.running_mean.double(), running_mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(norm.running_var.double(), running_var, rtol=1e-2, atol=1e-2)
    assert norm.num_batches_tracked == 1


def test_with_its_quantizer_off_it_is_the_float_pair():
    x = torch.randn(5, 3, 6, 6)
    layer, norm = installed()
    layer.weight_quantizer.enabled = False
    twin = ConvNorm()
    layer.eval(), norm.eval(), twin.eval()
    torch.testing.assert_close(layer.compute(x), twin(x), rtol=1e-5, atol=1e-5)
    layer.train(), norm.train(), twin.train()
    assert torch.equal(layer.compute(x), twin(x))
    assert torch.equal(norm.running_var, twin.norm.running_var)


def test_the_quantized_linear_layer_equals_numpy():
    layer, x = linear().eval(), torch.randn(7, 6)
    weight = quantized_by_hand(numbers(layer.weight), True)
    np.testing.assert_allclose(
        numbers(layer.compute(x)), numbers(x) @ weight.T + numbers(layer.bias), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_gradients_reach_weight_scale_gamma_and_beta(frozen):
    layer, norm = installed()
    layer.batch_norm_frozen = frozen
    layer.train(), norm.train()
    x = torch.randn(5, 3, 6, 6, requires_grad=True)
    (layer.compute(x) * torch.randn(5, 4, 6, 6)).sum().backward()
    for parameter in (x, layer.weight, layer.weight_quantizer.log2_scale, norm.weight, norm.bias):
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_fine_quantizer_gives_the_gradients_of_the_float_pair(frozen):
    layer, norm = installed(QuantizerSpec(bits=16, narrow_range=True, axis=0, observer="minmax"))
    # Room at the ends: on the last code the gradient stops.
    layer.weight_quantizer.set_qparams(layer.weight_quantizer.scale * 1.01)
    layer.batch_norm_frozen = frozen
    layer.train(), norm.train()
    twin = ConvNorm().train(not frozen)
    x, upstream = torch.randn(5, 3, 6, 6), torch.randn(5, 4, 6, 6)
    (layer.compute(x) * upstream).sum().backward()
    (twin(x) * upstream).sum().backward()
    pairs = [(layer.weight, twin.conv.weight), (norm.weight, twin.norm.weight), (norm.bias, twin.norm.bias)]
    for ours, theirs in pairs:
        assert (ours.grad - theirs.grad).norm() < 1e-3 * theirs.grad.norm()


def source(scale: float) -> FakeQuantize:
    made = FakeQuantize(QuantizerSpec(signed=False, non_negative=True))
    made.set_qparams(torch.tensor(scale))
    return made


def test_in_evaluation_the_bias_is_rounded_to_int32_steps_and_in_training_it_is_not():
    layer = linear()
    layer.set_input_quantizer(source(0.5))  # coarse, so that it shows
    with torch.no_grad():
        layer.weight_quantizer.set_qparams(torch.full((4,), 0.25))
    zeros = torch.zeros(1, 6)
    expected = np.rint(numbers(layer.bias) / 0.125) * 0.125
    assert np.abs(expected - numbers(layer.bias)).max() > 0.01
    np.testing.assert_array_equal(numbers(layer.eval()(zeros))[0], expected)
    assert torch.equal(layer.train()(zeros)[0], layer.bias)
    layer.eval().quantizer_of_input.enabled = False
    assert torch.equal(layer.compute(zeros)[0], layer.bias)


@pytest.mark.parametrize(
    "make, axes",
    [(linear, (0,)), (lambda: installed()[0], (0, 2, 3))],
    ids=["bias of the layer", "bias of its batch norm"],
)
def test_a_bias_has_its_gradient_in_evaluation_too(make, axes):
    """A backbone that is kept in evaluation, so that its batch norms stand still, is trained all the same."""
    layer = make().eval()
    layer.set_input_quantizer(source(0.5))
    layer.batch_norm_frozen = True
    out = layer.compute(torch.randn(7, 6) if len(axes) == 1 else torch.randn(5, 3, 6, 6))
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    torch.testing.assert_close(layer.shifted_bias().grad, upstream.sum(axes))


def test_the_scale_on_the_device_leaves_room_for_the_bias():
    layer = linear()
    with torch.no_grad():
        layer.weight[2] = 1e-12
        layer.bias[2] = 3.0
    layer.initialize_scale()
    assert torch.equal(layer.device_scale(), layer.weight_quantizer.scale)
    layer.set_input_quantizer(source(0.01))
    scale = layer.device_scale()
    same = [0, 1, 3]
    assert torch.equal(scale[same], layer.weight_quantizer.scale[same])
    assert 3.0 / (0.01 * scale[2]) < 2**31
    assert layer.eval()(torch.zeros(1, 6))[0, 2].item() == pytest.approx(3.0, rel=1e-6)


def test_a_dead_channel_does_not_overflow():
    layer, norm = installed()
    with torch.no_grad():
        norm.weight[0] = 0.0
    layer.initialize_scale()
    x = torch.randn(5, 3, 6, 6)
    for frozen in (False, True):
        layer.batch_norm_frozen = frozen
        layer.train(), norm.train()
        layer.compute(x).square().sum().backward()
        assert (
            layer.compute(x).isfinite().all()
            and layer.weight.grad.isfinite().all()
            and norm.weight.grad.isfinite().all()
        )
    layer.eval(), norm.eval()
    torch.testing.assert_close(layer.compute(x)[:, 0], norm.bias[0].expand(5, 6, 6))


def test_codes_are_the_integers_of_the_weight_on_the_device():
    for layer in (installed()[0].eval(), linear().eval()):
        scale = layer.weight_quantizer.scale.detach()
        codes = layer.codes(scale)
        assert codes.dtype == torch.int32 and codes.abs().max() == 127
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        assert torch.equal(codes * scale.view(shape), layer.folded(scale)[0])


def test_a_shift_goes_to_the_bias_or_to_beta_and_says_if_there_is_none():
    shift = torch.arange(4.0)
    layer, norm = installed()
    bias, beta = layer.bias.clone(), norm.bias.clone()
    assert layer.shift_bias(shift)
    assert torch.equal(norm.bias, beta + shift) and torch.equal(layer.bias, bias)
    assert not linear(bias=False).shift_bias(shift)
    layer = linear()
    bias = layer.bias.clone()
    assert layer.shift_bias(shift) and torch.equal(layer.bias, bias + shift)


def test_the_layer_stays_the_object_of_the_class_that_it_was():
    model = ConvNorm()
    conv, weight = model.conv, model.conv.weight
    layer = install_layer(conv, aten.conv2d.default, ([1, 1], [1, 1]), PER_CHANNEL, 0, model.norm)
    assert layer is conv and layer.weight is weight
    assert isinstance(layer, nn.Conv2d) and type(layer).__name__ == "Conv2d"
    assert (layer.kernel_size, layer.padding, layer.out_channels) == ((3, 3), (1, 1), 4)
    # The batch norm is registered once, where it was.
    assert [path for path, _ in model.named_modules()] == ["", "conv", "conv.weight_quantizer", "norm"]
    assert list(qat_layers(model)) == ["conv"]


def test_a_copy_refers_to_its_own_batch_norm():
    model = ConvNorm()
    install_layer(model.conv, aten.conv2d.default, ([1, 1], [1, 1]), PER_CHANNEL, 0, model.norm)
    twin = copy.deepcopy(model)
    assert twin.conv.batch_norm is twin.norm and twin.norm is not model.norm


def test_an_excluded_batch_norm_can_be_frozen():
    norm = spread(nn.Sequential(nn.BatchNorm2d(4)))[0]
    twin, x = copy.deepcopy(norm), torch.randn(5, 4, 6, 6)
    install_freezable_norm(norm)
    install_freezable_norm(norm)  # a second call changes nothing
    assert isinstance(norm, FreezableBatchNorm) and isinstance(norm, nn.BatchNorm2d)
    assert torch.equal(norm.train()(x), twin.train()(x))
    assert torch.equal(norm.running_mean, twin.running_mean)
    norm.batch_norm_frozen = True
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm(x), twin.eval()(x))
    assert torch.equal(norm.running_mean, before)
