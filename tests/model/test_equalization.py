from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, fake_quant_disabled, freeze_ranges, prepare_qat
from hf_qat.model import equalization, reconstruction
from hf_qat.model.equalization import equalize, equalize_if_nearer
from tests.models import detr, mobilenet_v2, regnet, resnet, spread, swin, vit, yolos


class Uneven(nn.Module):
    """Channels whose sizes are 64 times apart, which a next layer makes up for."""

    def __init__(self, activation: nn.Module | None = None, depthwise: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.activation = nn.ReLU() if activation is None else activation
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=16) if depthwise else nn.Conv2d(16, 8, 1)
        spread(self)
        sizes = torch.logspace(-3, 3, 16, base=2)
        with torch.no_grad():
            self.first.weight.mul_(sizes.view(-1, 1, 1, 1))
            self.first.bias.mul_(sizes)
            self.second.weight.div_(sizes.view((-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


def images(count: int, size: int = 16, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).split(8))


def answers(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def errors(model: nn.Module, target: str) -> list[float]:
    """Mean square of what a calibrated model is off, as it is and equalized."""
    batches, x = images(64), images(8, seed=1)[0]
    with torch.no_grad():
        expected = model(x)
    found = []
    for equalized in (False, True):
        prepared = prepare_qat(copy.deepcopy(model), QATConfig(target), x).eval()
        if equalized:
            assert equalize(prepared, batches) > 8
        with torch.no_grad(), fake_quant_disabled(prepared):
            torch.testing.assert_close(prepared(x), expected, rtol=1e-5, atol=1e-5)
        calibrate(prepared, batches)
        with torch.no_grad():
            found.append(float((prepared(x) - expected).square().mean()))
    return found


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (resnet, False),
        (resnet, True),
        (regnet, False),
        (regnet, True),
        pytest.param(mobilenet_v2, False, marks=[pytest.mark.slow]),
    ],
)
def test_in_float_the_model_computes_what_the_users_own_does(make, training: bool):
    batches = images(16, 32)
    model = make().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = answers(copy.deepcopy(model), batches[0])
    prepared = prepare_qat(model, QATConfig(), batches[0])
    assert equalize(prepared, batches) > 0
    with fake_quant_disabled(prepared):
        found = answers(prepared.train(training), batches[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("make", [pytest.param(detr, marks=pytest.mark.slow), yolos])
def test_linear_layers_of_detectors_do_too(make):
    batches = images(8, 64)
    model = make().eval()
    with torch.no_grad():
        expected = model(batches[0])
    prepared = prepare_qat(copy.deepcopy(model), QATConfig(), batches[0]).eval()
    assert equalize(prepared, batches) > 0
    with torch.no_grad(), fake_quant_disabled(prepared):
        found = prepared(batches[0])
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0.0, atol=1e-4)
    scale = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.0, atol=1e-4 * scale)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("target", ["w4a4", "w4a8", "TDA4VM"])
def test_uneven_channels_lose_less(depthwise: bool, target: str):
    before, after = errors(Uneven(depthwise=depthwise).eval(), target)
    assert after < 0.6 * before


class UnevenNorm(nn.Module):
    """What a layer norm makes has channels whose sizes are 64 times apart, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.query, self.last = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        spread(self)
        sizes = torch.logspace(-3, 3, 16, base=2)
        with torch.no_grad():
            self.norm.weight.copy_(sizes)
            self.norm.bias.copy_(0.3 * sizes)
            for layer in (self.query, self.last):
                layer.weight.div_(sizes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        return torch.cat([self.query(rows), self.last(rows)], -1)


@pytest.mark.parametrize("target", ["w4a4", "w4a8", "int8", "TDA4VM"])
def test_uneven_channels_of_a_layer_norm_lose_less(target: str):
    before, after = errors(UnevenNorm().eval(), target)
    assert after < 0.6 * before


@pytest.mark.parametrize("make", [vit, pytest.param(swin, marks=pytest.mark.slow)])
def test_transformers_compute_what_they_did(make):
    batches = images(16, 32)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.randn(module.weight.shape).mul(1.5).exp())
        expected = answers(model, batches[0])
    prepared = prepare_qat(copy.deepcopy(model), QATConfig(), batches[0]).eval()
    assert equalize(prepared, batches) > 0
    norms = {name: parameter for name, parameter in model.named_parameters() if "norm" in name}
    assert any(not torch.equal(parameter, prepared.get_parameter(name)) for name, parameter in norms.items())
    with torch.no_grad(), fake_quant_disabled(prepared):
        torch.testing.assert_close(answers(prepared, batches[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_channel_that_relu6_cuts_off_stays_and_the_others_stay_below_it():
    batches = images(64)
    model = Uneven(nn.ReLU6())
    with torch.no_grad():
        reached = torch.cat([model.first(x) for x in batches]).amax((0, 2, 3))
    before = model.first.weight.detach().clone()
    prepared = prepare_qat(model, QATConfig("w4a4"), batches[0])
    equalize(prepared, batches)
    factors = (prepared.first.weight / before).detach().mean((1, 2, 3))
    cut_off = reached > 6.0
    assert cut_off.any() and not cut_off.all()
    torch.testing.assert_close(factors[cut_off], torch.ones(int(cut_off.sum())))
    assert (factors * reached)[~cut_off].max() <= 6.0
    assert factors[~cut_off].max() > 4.0


def test_frozen_ranges_keep_their_layers():
    batches = images(16)
    model = prepare_qat(Uneven(), QATConfig(), batches[0])
    calibrate(model, batches)
    before = model.first.weight.detach().clone()
    assert equalize(freeze_ranges(model), batches) == 0
    assert torch.equal(model.first.weight, before)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconstruction, "STEPS", 2)


def test_the_best_calibration_equalizes(few_steps):
    batches, x = images(64), images(8, seed=1)[0]
    expected = Uneven().eval()(x)
    prepared = prepare_qat(Uneven(), QATConfig("w4a4"), x).eval()
    before = float(prepared.first.weight.detach().flatten(1).norm(dim=1).log2().std())
    errors = []
    for effort in ("fast", "best"):
        calibrate(prepared, batches, effort=effort)
        errors.append((prepared(x) - expected).square().mean().item())
    assert errors[1] < 0.6 * errors[0]
    assert float(prepared.first.weight.detach().flatten(1).norm(dim=1).log2().std()) < 0.7 * before


def test_what_brings_the_outputs_no_nearer_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    batches = images(16)
    model = calibrate(prepare_qat(Uneven(), QATConfig("w4a4"), batches[0]), batches)
    before = copy.deepcopy(model.state_dict())
    told = iter([20.0, 20.0])
    monkeypatch.setattr(equalization, "outputs_sqnr", lambda *_: next(told))
    assert not equalize_if_nearer(model, batches, lambda: calibrate(model, batches))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
