from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.errors import CalibrationError
from hf_qat.model.bias_correction import bias_shifts, channel_mean, shift_biases
from hf_qat.quantization.quantizer import fake_quantizers
from tests.blocks import BLOCKS


class Biased(nn.Module):
    """A layer whose weights all lie 0.4 steps above a code (at 4 bits), and inputs of mean 1."""

    def __init__(self, bias: bool, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 6, bias=bias)
        self.norm = nn.BatchNorm1d(6, eps=1e-12) if norm else nn.Identity()
        with torch.no_grad():
            codes = torch.randint(-6, 6, (6, 32), generator=torch.Generator().manual_seed(0)) + 0.4
            codes[:, 0] = 7.0  # fixes the step at 1
            self.linear.weight.copy_(codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize("norm", [False, True], ids=["bias", "batch norm"])
def test_bias_correction_takes_the_mean_error_away_and_touches_no_weight(norm):
    x = 1 + 0.1 * torch.randn(64, 32)
    config = QATConfig(weights={"bits": 4, "observer": "minmax"})
    results, states = [], []
    float_model = Biased(bias=not norm, norm=norm).eval()
    with torch.no_grad():
        expected = float_model(x).mean(0)
    for correction in (False, True):
        model = prepare_qat(copy.deepcopy(float_model), config, x)
        states.append(copy.deepcopy(model.state_dict()))
        calibrate(model, [x[:32], x[32:]], bias_correction=correction)
        with torch.no_grad():
            results.append(model(x).mean(0))
    error, corrected = ((result - expected).abs() for result in results)
    assert (
        error.median() > 12 and error.min() > 3
    )  # 31 weights, each 0.4 too small; the range of the output ends there
    assert corrected.max() < 0.02 * error.min()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, states[1][key])}
    assert {key for key in changed if "quantizer" not in key} == {"norm.bias" if norm else "linear.bias"}


def test_bias_correction_leaves_a_layer_without_a_bias_alone():
    x = 1 + 0.1 * torch.randn(64, 32)
    model = prepare_qat(Biased(bias=False, norm=False).eval(), QATConfig(), x)
    weight = model.linear.weight.detach().clone()
    calibrate(model, [x])
    assert model.linear.bias is None and torch.equal(model.linear.weight, weight)


@pytest.mark.parametrize("normalize", [False, True], ids=["no bias", "batch norm without one"])
def test_the_layer_after_one_without_a_bias_makes_up_for_it(normalize):
    torch.manual_seed(2)
    x, norm = 2 + torch.randn(256, 12), nn.BatchNorm1d(16, affine=False) if normalize else nn.Identity()
    float_model = nn.Sequential(nn.Linear(12, 16, bias=False), norm, nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        expected = float_model(x).mean(0)
        errors = []
        for correction in (False, True):
            model = prepare_qat(copy.deepcopy(float_model), QATConfig(weights={"bits": 3}), x)
            errors.append((calibrate(model, [x], bias_correction=correction)(x).mean(0) - expected).abs().max())
    assert errors[0] > 0.05 and errors[1] < 0.05 * errors[0]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Parts(nn.Module):
    """Two parts that are captured one by one, with a parameter in common."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()
        setattr(self.second.linear, name, getattr(self.first.linear, name))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.second(self.first(x))


class OneNorm(nn.Module):
    """Two layers before one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("make", [lambda: Parts("bias"), OneNorm], ids=["one bias", "one batch norm"])
def test_a_bias_of_two_layers_does_not_get_what_each_of_them_needs(make):
    torch.manual_seed(0)
    x, float_model = 2 + torch.randn(256, 12), make().eval()
    expected, errors = float_model(x), []
    for correction in (False, True):
        model = prepare_qat(copy.deepcopy(float_model), QATConfig(weights={"bits": 3}), {"x": x})
        calibrate(model, [{"x": x}], bias_correction=correction)
        with torch.no_grad():
            errors.append(float((model(x) - expected).norm() / expected.norm()))
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_bias_correction_brings_the_mean_output_of_every_block_to_the_float_blocks(name):
    block = BLOCKS[name]
    x, float_model = block.data(64), block.module()
    with torch.no_grad():
        expected = float_model(x)
    errors = []
    for correction in (False, True):
        model = prepare_qat(block.module(), QATConfig(weights={"bits": 3}), x)
        calibrate(model, [x], bias_correction=correction)
        with torch.no_grad():
            result = model(x)
        errors.append(((result - expected).mean(0).norm() / expected.mean(0).norm()).item())
        assert (result - expected).norm() / expected.norm() < 0.5
    assert errors[1] < 1.1 * errors[0]


class Chain(nn.Module):
    """Two convolutions with a ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def rounded(x: np.ndarray, quantizer: nn.Module) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear, in numpy; scales of a weight run along its first axis."""
    scale = quantizer.scale.detach().numpy().reshape(-1, *[1] * (x.ndim - 1))
    zero = 0 if quantizer.zero_point is None else np.rint(quantizer.zero_point.detach().numpy())
    return (np.clip(np.rint(x / scale) + zero, quantizer.spec.qmin, quantizer.spec.qmax) - zero) * scale


def rounded_bias(bias: np.ndarray, weight: nn.Module, source: nn.Module) -> np.ndarray:
    """To multiples of the product of both scales, as in int32."""
    step = (weight.scale * source.scale).detach().numpy()[:, None, None]
    return np.rint(bias / step) * step


def test_each_bias_moves_by_the_mean_error_that_is_left_once_those_before_it_are_corrected():
    """Worked out in numpy, layer by layer: a 1x1 convolution is a product with a matrix."""
    torch.manual_seed(1)
    x = 2 + torch.randn(16, 3, 4, 4)
    float_model = Chain().eval()
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(weights={"bits": 3}), x)
    calibrate(model, [x], bias_correction=False)
    found = fake_quantizers(model)
    (w1, b1), (w2, b2) = (
        (layer.weight.detach().numpy()[:, :, 0, 0], layer.bias.detach().numpy()[:, None, None])
        for layer in (float_model.first, float_model.second)
    )
    pixels = x.numpy()
    hidden = np.einsum("oc,nchw->nohw", w1, pixels) + b1
    output = np.einsum("oc,nchw->nohw", w2, np.maximum(hidden, 0)) + b2

    weight, source = found["first.weight_quantizer"], found["x_quantizer"]
    noisy = np.einsum("oc,nchw->nohw", rounded(w1, weight), rounded(pixels, source))
    noisy += rounded_bias(b1, weight, source)
    first = (hidden - noisy).mean((0, 2, 3))
    weight, source = found["second.weight_quantizer"], found["first.activation_quantizer"]
    codes = rounded(np.maximum(noisy + first[:, None, None], 0), source)
    noisy = np.einsum("oc,nchw->nohw", rounded(w2, weight), codes) + rounded_bias(b2, weight, source)
    second = (output - noisy).mean((0, 2, 3))

    shift_biases(bias_shifts(model, [x]))
    assert min(abs(first).max(), abs(second).max()) > 0.01
    for layer, start, shift in ((model.first, b1, first), (model.second, b2, second)):
        np.testing.assert_allclose(layer.bias.detach().numpy() - start[:, 0, 0], shift, atol=2e-4)


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 6), (0, 2, 3)),
        (nn.Conv1d(3, 4, 1), (2, 3, 5), (0, 2)),
        (nn.Linear(3, 4), (2, 7, 3), (0, 1)),
        (nn.Linear(3, 4), (2, 3), (0,)),
    ],
    ids=["conv2d", "conv1d", "linear on tokens", "linear"],
)
def test_the_mean_of_an_output_is_per_channel(layer, shape, axes):
    x = torch.randn(shape)
    prepared = prepare_qat(nn.Sequential(layer), QATConfig(), x)[0]
    output = torch.randn(layer(x).shape)
    np.testing.assert_allclose(channel_mean(output, prepared).numpy(), output.numpy().mean(axes), atol=1e-6)


def test_a_bias_that_requires_no_gradient_is_left_alone_and_named_and_the_others_are_corrected(caplog):
    x = 1 + 0.1 * torch.randn(64, 32)
    float_model = nn.Sequential(Biased(bias=True, norm=False), nn.ReLU(), nn.Linear(6, 3)).eval()
    float_model[0].linear.bias.requires_grad_(False)
    model = prepare_qat(float_model, QATConfig(weights={"bits": 4, "observer": "minmax"}), x)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level("INFO", "hf_qat.model.bias_correction"):
        calibrate(model, [x])
    assert torch.equal(model.state_dict()["0.linear.bias"], before["0.linear.bias"])
    assert not torch.equal(model.state_dict()["2.bias"], before["2.bias"])
    assert "leaves 1 layers alone, whose biases do not require gradients: 0.linear" in caplog.text


@pytest.fixture
def chain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Chain().eval(), 2 + torch.randn(32, 3, 4, 4)


def prepared(chain: tuple[nn.Module, Tensor]) -> nn.Module:
    return prepare_qat(copy.deepcopy(chain[0]), QATConfig(weights={"bits": 3}), chain[1])


def test_a_second_calibration_corrects_against_the_float_model_and_not_against_the_first_correction(chain):
    model, x = prepared(chain), chain[1]
    calibrate(model, [10 * x])
    calibrate(copy.deepcopy(calibrate(model, [x])), [10 * x])  # a copy has its own
    once, twice = calibrate(prepared(chain), [x]).state_dict(), calibrate(model, [x]).state_dict()
    assert all(torch.equal(value, once[key]) for key, value in twice.items())
    with torch.no_grad():
        wanted = chain[0](x)
        assert float((model(x) - wanted).mean((0, 2, 3)).abs().max()) < 0.02 * float(wanted.std())


def test_a_calibration_without_correction_leaves_the_correction_of_the_one_before(chain):
    model, x = calibrate(prepared(chain), [chain[1]]), chain[1]
    once = copy.deepcopy(model.state_dict())
    calibrate(model, [x], bias_correction=False)
    assert torch.equal(model.first.bias, once["first.bias"]) and not torch.equal(model.first.bias, chain[0].first.bias)
    twice = calibrate(model, [x]).state_dict()
    assert all(torch.equal(value, once[key]) for key, value in twice.items())


def test_a_first_calibration_without_correction_leaves_it_to_the_next_one(chain, caplog):
    model, x = calibrate(prepared(chain), [chain[1]], bias_correction=False), chain[1]
    assert torch.equal(model.first.bias, chain[0].first.bias)
    expected = calibrate(prepared(chain), [x]).state_dict()
    found = calibrate(model, [x]).state_dict()
    assert torch.equal(found["first.bias"], expected["first.bias"])
    assert not torch.equal(found["first.bias"], chain[0].first.bias) and "came with ranges" not in caplog.text


def test_biases_that_were_trained_or_loaded_since_are_what_the_next_correction_begins_with(chain):
    model, other = calibrate(prepared(chain), [chain[1]]), prepared(chain)
    with torch.no_grad():
        for layer in (model.first, other.first):
            layer.bias.fill_(3.0)
        other.second.bias.copy_(chain[0].second.bias)
    model.load_state_dict({"second.bias": chain[0].second.bias}, strict=False)
    for of in (model, other):
        calibrate(of, [chain[1]])
    assert torch.equal(model.first.bias, other.first.bias) and torch.equal(model.second.bias, other.second.bias)


def test_biases_that_were_loaded_with_their_ranges_are_corrected_again_only_if_that_is_asked_for(chain, caplog):
    model, x = calibrate(prepared(chain), [chain[1]]), chain[1]
    calibrate(model, [x])  # it knows what to take back
    assert "came with ranges" not in caplog.text
    loaded = prepared(chain)
    loaded.load_state_dict(model.state_dict())
    again = copy.deepcopy(loaded)
    loaded.second.weight_quantizer.observed.zero_()  # as of a new head
    for count in (1, 2):
        calibrate(loaded, [x])
        assert caplog.text.count("came with ranges") == count
    for name in ("first", "second"):
        assert torch.equal(getattr(loaded, name).bias, getattr(model, name).bias)
    calibrate(again, [x], bias_correction=True)
    assert not torch.equal(again.first.bias, model.first.bias)


def test_a_calibration_that_fails_leaves_the_corrections_of_the_one_before(chain):
    model, x = calibrate(prepared(chain), [chain[1]]), chain[1]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError):
        calibrate(model, [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    twice = calibrate(model, [x]).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in twice.items())
