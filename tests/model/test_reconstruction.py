from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, freeze_ranges, prepare_qat
from hf_qat.errors import ConfigError
from hf_qat.export.verify import Session
from hf_qat.model import reconstruction
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import hand_written, spread


def images(count: int, seed: int) -> Tensor:
    """Smooth ones, so that what is learned of some holds for others."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(reconstruction, "STEPS", 60)


def calibrated(
    effort: str | None, target: str | QATConfig = "w4a4", prepare=lambda model: model, **options
) -> nn.Module:
    config = target if isinstance(target, QATConfig) else QATConfig(target)
    model = prepare(prepare_qat(hand_written().eval(), config, torch.zeros(2, 3, 32, 32)))
    return calibrate(model, list(images(256, seed=1).split(16)), effort=effort, **options)


@cache
def both(target: str = "w4a4") -> tuple[nn.Module, nn.Module]:
    """Calibrated fast, and with effort; they are for looking at."""
    return calibrated("fast", target), calibrated("best", target)


@torch.no_grad()
def output_error(model: nn.Module) -> float:
    """Squared error of the output on images of its own, against the model that was never prepared."""
    x = images(64, seed=2)
    expected = hand_written().eval()(x)
    return ((model(x) - expected).square().mean() / expected.var()).item()


@pytest.mark.parametrize("target", ["w4a4", "w4a8"])
def test_the_output_is_nearer_to_that_of_the_float_model_on_images_never_seen(target):
    fast, best = map(output_error, both(target))
    assert best < 0.9 * fast


@pytest.mark.slow
def test_effort_and_the_correction_of_biases_are_those_of_the_config_if_nothing_is_said():
    config = QATConfig("w4a4", calibration_effort="best", bias_correction=False)
    told, said = calibrated(None, config), calibrated("best", bias_correction=False)
    assert all(torch.equal(value, said.state_dict()[key]) for key, value in told.state_dict().items())
    assert output_error(told) < 0.9 * output_error(calibrated("fast", config))


def test_an_effort_that_is_not_known_is_refused_before_anything_changes():
    model = prepare_qat(hand_written().eval(), QATConfig("w4a4"), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ConfigError, match="effort must be 'fast' or 'best', not 'most'"):
        calibrate(model, [images(4, seed=1)], effort="most")
    assert not any(int(quantizer.observed) for quantizer in fake_quantizers(model).values())


def test_no_code_of_a_weight_moves_by_more_than_one_and_some_do():
    fast, best = map(qat_layers, both())
    moves = []
    for path, layer in best.items():
        moves.append((layer.codes(layer.device_scale()) - fast[path].codes(fast[path].device_scale())).abs().flatten())
        assert torch.equal(layer.weight_quantizer.scale, fast[path].weight_quantizer.scale)
    assert torch.cat(moves).max() == 1 and 0 < torch.cat(moves).float().mean() < 0.5


def test_the_converted_model_computes_what_the_prepared_one_does_and_so_does_onnx_runtime(tmp_path):
    model, x = calibrated("best", "int8"), images(16, seed=3)
    with torch.no_grad():
        prepared = model(x)
        convert(model)
        assert torch.equal(model(x), prepared)
    report = export_onnx(model, tmp_path / "model.onnx", x)
    assert report.top1_agreement == 1.0
    (found,) = Session(tmp_path / "model.onnx", True).run([x.numpy()])
    step = model.head.activation_quantizer.scale.item()
    assert np.abs(found - prepared.numpy()).max() <= 1.01 * step


def test_the_same_images_lead_to_the_same_model_whatever_random_numbers_were_drawn():
    first, x = both()[1].state_dict(), list(images(256, seed=1).split(16))
    model = prepare_qat(hand_written().eval(), QATConfig("w4a4"), torch.zeros(2, 3, 32, 32))
    torch.manual_seed(99)
    drawn = torch.random.get_rng_state()
    second = calibrate(model, x, effort="best").state_dict()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(first[key], value) for key, value in second.items())


def test_what_does_not_require_gradients_and_frozen_ranges_stay():
    def freeze(model: nn.Module) -> nn.Module:
        for parameter in (model.stem.weight, model.body_norm.bias, model.x_quantizer.log2_scale):
            parameter.requires_grad_(False)
        return model

    fast = calibrated("fast", prepare=freeze, bias_correction=False).state_dict()
    best = calibrated("best", prepare=freeze).state_dict()
    for key in ("stem.weight", "body_norm.bias", "stem_norm.weight", "stem_norm.running_mean"):
        assert torch.equal(best[key], fast[key]), key
    for key in ("body.weight", "stem_norm.bias", "head.bias", "cat_0_quantizer.log2_scale"):
        assert not torch.equal(best[key], fast[key]), key
    model = freeze_ranges(copy.deepcopy(both()[0]))
    before = {path: quantizer.scale.clone() for path, quantizer in fake_quantizers(model).items()}
    calibrate(model, [images(16, seed=1)], effort="best")
    assert all(torch.equal(fake_quantizers(model)[path].scale, scale) for path, scale in before.items())


@pytest.mark.slow
def test_biases_stay_where_they_are_not_to_be_corrected():
    fast, best = (calibrated(effort, bias_correction=False).state_dict() for effort in ("fast", "best"))
    for key in ("stem_norm.bias", "body_norm.bias", "head.bias"):
        assert torch.equal(best[key], fast[key]), key
    assert not torch.equal(best["body.weight"], fast["body.weight"])


class Parts(nn.Module):
    """Two parts that are captured one by one, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(2))
        self.second[0].weight = self.first[0].weight

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.second(self.first(x))


def test_a_weight_of_two_layers_is_not_learned_by_each_of_them():
    torch.manual_seed(0)
    model = prepare_qat(Parts().eval(), QATConfig("w4a4"), {"x": torch.zeros(2, 3, 32, 32)})
    weight, bias = model.first[0].weight.clone(), model.first[0].bias.clone()
    calibrate(model, [{"x": x} for x in images(64, seed=1).split(16)], effort="best")
    assert model.second[0].weight is model.first[0].weight and torch.equal(model.first[0].weight, weight)
    assert not torch.equal(model.first[0].bias, bias)


class Branch(nn.Module):
    """A branch that begins as zeros, as in ControlNet or with a scale per layer of 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.branch.weight.mul_(weight)
            self.branch.bias.mul_(weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.branch(x))


@pytest.mark.parametrize("weight", [0.0, 1e-20])
def test_a_tensor_that_is_zero_in_float_is_no_divergence(weight):
    torch.manual_seed(0)
    float_model, errors = Branch(weight).eval(), []
    x, new = images(64, seed=1), images(64, seed=2)
    for effort in ("fast", "best"):
        model = prepare_qat(copy.deepcopy(float_model), QATConfig(weights={"bits": 4}), x[:2])
        calibrate(model, x.split(8), effort=effort)
        with torch.no_grad():
            errors.append(float((model(new) - float_model(new)).norm()))
    assert errors[1] < 0.95 * errors[0]


def test_if_nothing_is_gained_all_stays(monkeypatch):
    monkeypatch.setattr(reconstruction, "ROUNDING_RATE", 30.0)  # codes by chance
    monkeypatch.setattr(reconstruction, "STEPS", 1)
    fast, best = (calibrated(effort, "int8", bias_correction=False) for effort in ("fast", "best"))
    for path, layer in qat_layers(best).items():
        assert torch.equal(layer.weight, qat_layers(fast)[path].weight)
    with_scales = calibrated("best", "int8", bias_correction=False, prepare=freeze_ranges)
    scales = {path: quantizer.scale for path, quantizer in fake_quantizers(with_scales).items()}
    assert all(torch.equal(quantizer.scale, scales[path]) for path, quantizer in fake_quantizers(best).items())


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_before_its_layer_keeps_its_weight_and_the_layers_learn(affine):
    """As in DenseNet: in integers it is a layer of its own, with one number a channel for a weight, or none."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, affine=affine)
    layers = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), norm, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    net = spread(nn.Sequential(*layers))
    original = copy.deepcopy(net.eval())
    x, error = images(64, seed=2), {}
    for effort in ("fast", "best"):
        model = prepare_qat(copy.deepcopy(net), QATConfig("int8", weights={"bits": 3}), x[:2])
        calibrate(model, list(images(64, seed=1).split(16)), effort=effort)
        with torch.no_grad():
            error[effort] = (model(x) - original(x)).square().mean().item()
        assert not affine or torch.equal(model[2].weight, norm.weight)
    assert error["best"] < 0.9 * error["fast"]


def test_modes_gradients_and_statistics_are_left_alone():
    model = prepare_qat(hand_written().eval(), QATConfig("w4a4"), torch.zeros(2, 3, 32, 32)).train()
    model.body_norm.eval()
    statistics = copy.deepcopy([model.stem_norm.state_dict(), model.body_norm.running_var])
    calibrate(model, [images(16, seed=1)], effort="best")
    assert model.training and model.stem_norm.training and not model.body_norm.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.stem_norm.running_var, statistics[0]["running_var"])
    assert torch.equal(model.body_norm.running_var, statistics[1])
