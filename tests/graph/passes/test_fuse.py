from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, freeze_batch_norm, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import spread


#: Scales by the largest magnitude, which numpy can follow.
BY_EXTREMES = {"observer": "minmax"}


class Pair(nn.Module):
    """A layer and a batch norm."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


PAIRS = {
    "conv": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (4, 7, 7), 0),
    "conv_with_bias": (nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (4, 7, 7), 0),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (4, 7, 7), 0),
    "depthwise_dilated": (nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2), nn.BatchNorm2d(4), (4, 7, 7), 0),
    "padded_same": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (4, 7, 7), 0),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (4, 9), 0),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (5,), 0),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (4, 5, 5), 1),
    "without_affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False, eps=0.1), (4, 7, 7), 0),
}


def pair(name: str) -> tuple[Pair, Tensor, int]:
    layer, norm, shape, axis = PAIRS[name]
    return spread(Pair(copy.deepcopy(layer), copy.deepcopy(norm))).eval(), torch.randn(8, *shape), axis


def folded_by_hand(model: Pair, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """gamma / sigma times the weight, and what then is the bias, in float64."""
    norm = model.norm
    gamma, beta = (1.0, 0.0) if norm.weight is None else (array(norm.weight), array(norm.bias))
    factor = gamma / np.sqrt(array(norm.running_var) + norm.eps)
    bias = 0.0 if model.layer.bias is None else array(model.layer.bias)
    weight = np.moveaxis(array(model.layer.weight), axis, -1) * factor
    return np.moveaxis(weight, -1, axis), beta + (bias - array(norm.running_mean)) * factor


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_batch_norm_is_folded_into_the_codes_as_by_hand(name):
    model, x, axis = pair(name)
    weight, bias = folded_by_hand(model, axis)
    config = QATConfig(weights=BY_EXTREMES, activations=BY_EXTREMES)
    convert(calibrate(prepare_qat(model, config, x), [x], bias_correction=False))

    channels = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scale = np.abs(channels).max(1) / 127
    np.testing.assert_allclose(model.layer.weight_scale, scale, rtol=1e-5)
    codes = np.rint(channels / scale[:, None])
    stored = np.moveaxis(model.layer.codes.numpy(), axis, 0).reshape(codes.shape)
    assert (stored == codes).mean() > 0.99 and np.abs(stored - codes).max() <= 1  # near ties

    step = model.x_quantizer.scale.item() * scale
    assert model.layer.float_bias().shape == bias.shape
    assert np.abs(array(model.layer.float_bias()) - bias).max() <= step.max() * 0.51 + 1e-6
    assert isinstance(model.norm, nn.Identity)


@pytest.mark.parametrize("name", PAIRS)
def test_a_folded_pair_computes_what_the_pair_computes(name):
    model, x, _ = pair(name)
    float_model = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), x)
    assert list(qat_layers(model)) == ["layer"] and model.layer.batch_norm is model.norm
    with fake_quant_disabled(model), torch.no_grad():
        torch.testing.assert_close(model(x), float_model(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.train()(x), float_model.train()(x))
        for name, value in float_model.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], value)


def test_a_pair_that_is_called_twice_is_folded_once():
    class Twice(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.relu(super().forward(x)))

    float_model = spread(Twice(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))).eval()
    model, x = copy.deepcopy(float_model), torch.randn(4, 4, 6, 6)
    prepare_qat(model, QATConfig(), x)
    with fake_quant_disabled(model), torch.no_grad():
        torch.testing.assert_close(model(x), float_model(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(model.train()(x), float_model.train()(x))
    assert torch.equal(model.norm.running_mean, float_model.norm.running_mean)
    assert model.norm.num_batches_tracked == float_model.norm.num_batches_tracked == 2


class SharedConv(nn.Module):
    """One convolution, and a batch norm of its own behind each of its two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


class TwoUsers(nn.Module):
    """The batch norm is not the only one that reads the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class NormFirst(nn.Module):
    """As in pre-activation networks; and pooling keeps the second batch norm apart from its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.behind = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(functional.max_pool2d(self.conv(torch.relu(self.norm(x))), 2))


class CalledTwice(nn.Module):
    """One batch norm, behind a convolution and somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.norm(self.conv(x))))


def grouped_transposed() -> nn.Module:
    return Pair(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (SharedConv, {"conv", "first", "second"}),
        (TwoUsers, {"conv", "norm"}),
        (NormFirst, {"norm", "conv", "behind"}),
        (CalledTwice, {"conv", "norm"}),
        (grouped_transposed, {"layer", "norm"}),
    ],
    ids=["shared", "two users", "norm first", "called twice", "grouped transposed"],
)
def test_a_batch_norm_that_cannot_be_folded_is_a_layer_of_its_own(make, layers):
    float_model = spread(make()).eval()
    model, x = copy.deepcopy(float_model), torch.randn(4, 4, 6, 6)
    prepare_qat(model, QATConfig(), x)
    assert set(qat_layers(model)) == layers
    assert all(layer.batch_norm is None for layer in qat_layers(model).values())
    with fake_quant_disabled(model), torch.no_grad():
        torch.testing.assert_close(model(x), float_model(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(model.train()(x), float_model.train()(x))
        assert all(torch.equal(dict(model.named_buffers())[k], v) for k, v in float_model.named_buffers())
        before = copy.deepcopy(dict(model.named_buffers()))
        result = freeze_batch_norm(model)(x)
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        torch.testing.assert_close(result, float_model.eval()(x), rtol=1e-4, atol=1e-4)
    calibrate(model, [x])
    expected = model.eval()(x)
    assert torch.equal(convert(model)(x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Standardized(nn.Module):
    """The weight is computed in the forward: no layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self.norm(functional.conv2d(x, weight))


class Tied(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize(
    ("make", "shape"), [(Standardized, (4, 6, 6)), (Tied, (4,))], ids=["computed weight", "tied weight"]
)
def test_weights_that_are_no_layers_own_keep_their_numbers_and_get_gradients(make, shape):
    float_model = spread(make()).eval()
    model, x = copy.deepcopy(float_model), torch.randn(4, *shape)
    prepare_qat(model, QATConfig(), x)
    with fake_quant_disabled(model), torch.no_grad():
        torch.testing.assert_close(model(x), float_model(x), rtol=1e-5, atol=1e-5)
    calibrate(model, [x])
    with torch.no_grad():
        noise = (model(x) - float_model(x)).norm() / float_model(x).norm()
    assert 0 < noise < 0.05
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in float_parameters(model))
    model.eval()
    assert torch.equal(convert(copy.deepcopy(model))(x), model(x))


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "quantizer" not in name]


class AddRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x) + self.two(x))


def test_a_sum_and_its_relu_have_one_quantizer():
    model = prepare_qat(AddRelu(), QATConfig(), torch.randn(2, 4, 6, 6))
    assert {path for path in fake_quantizers(model) if "weight" not in path} == {
        "x_quantizer",
        "one.activation_quantizer",
        "two.activation_quantizer",
        "add_0_quantizer",
    }
    assert model.add_0_quantizer.spec.non_negative
    assert not any("relu" in str(node.target) for node in model.graph.nodes)


def test_an_excluded_layer_stays_what_it_was_with_its_batch_norm_alive():
    float_model = spread(NormFirst()).eval()
    float_model.behind = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    spread(float_model)
    model, x = copy.deepcopy(float_model), torch.randn(4, 4, 6, 6)
    prepare_qat(model, QATConfig(exclude="behind"), x)
    assert set(qat_layers(model)) == {"norm", "conv"}
    assert type(model.behind[0]) is nn.Conv2d
    with fake_quant_disabled(model), torch.no_grad():
        assert torch.equal(model.train()(x), float_model.train()(x))
    assert torch.equal(model.behind[1].running_mean, float_model.behind[1].running_mean)
    assert not any(path.startswith("behind") for path in fake_quantizers(model))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("exclude", "refused"), [((), "layer"), ("layer", "norm")], ids=["no outputs", "no inputs"])
def test_a_weight_without_values_is_refused_by_name(exclude, refused):
    model = Pair(nn.Linear(4, 0), nn.Linear(0, 3))
    with pytest.raises(CaptureError, match=rf"the weight of {refused}, Linear, is of shape .* has no values"):
        prepare_qat(model, QATConfig(exclude=exclude), torch.randn(2, 4))
    assert not qat_layers(model)


def test_bits_of_first_and_last_layer_are_the_targets_edge_bits():
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    prepare_qat(layers, QATConfig("w4a4"), torch.randn(2, 4))
    assert [layers[k].weight_quantizer.spec.bits for k in range(4)] == [8, 4, 4, 8]
