import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.model.calibration import calibrate
from hf_qat.model.call_in_training import CallInTraining
from hf_qat.model.outgrown import renew_outgrown_ranges
from hf_qat.model.prepare import prepare_qat
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import made_once


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A body and a head, with dropout and a batch norm on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


@made_once
def prepared(**changes: object) -> nn.Module:
    model = Net()
    model(X)
    return calibrate(prepare_qat(model, QATConfig(**changes), X), [X]).train()


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: quantizer.scale.detach().clone() for path, quantizer in fake_quantizers(model).items()}


def test_ranges_that_hold_what_passes_stay_as_they_are_to_the_bit():
    model = prepared()
    before = scales(model)
    assert renew_outgrown_ranges(model, ((X,), {})) == []
    assert all(torch.equal(before[path], scale) for path, scale in scales(model).items())


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_head_that_has_grown_gets_ranges_that_hold_its_weights_and_its_outputs(observer: str):
    model = prepared(activations={"observer": observer}, weights={"observer": observer})
    before = scales(model)
    with torch.no_grad():
        model.head.weight *= 8
        model.head.bias *= 8
    renewed = renew_outgrown_ranges(model, ((), {"x": X}))
    assert sorted(renewed) == ["head.activation_quantizer", "head.weight_quantizer"]
    grown = scales(model)
    np.testing.assert_allclose(grown["head.weight_quantizer"], 8 * before["head.weight_quantizer"], rtol=1e-4)
    # 255 steps hold the range; dropout in this one call may have changed what is seen a little.
    assert 4 < grown["head.activation_quantizer"] / before["head.activation_quantizer"] < 16
    assert all(torch.equal(before[path], grown[path]) for path in before if not path.startswith("head."))


def test_the_run_that_looks_leaves_no_trace():
    model = prepared(freeze_bn_at=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[object] = []
    model.register_forward_hook(lambda *args: seen.append(args))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    renew_outgrown_ranges(model, ((X,), {}))
    assert torch.equal(torch.rand(2), expected) and seen == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(quantizer.enabled and quantizer.observer is None for quantizer in fake_quantizers(model).values())


def test_a_training_that_has_diverged_keeps_its_ranges():
    model = prepared()
    before = scales(model)
    assert renew_outgrown_ranges(model, ((X * torch.nan,), {})) == []
    assert all(torch.equal(before[path], scale) for path, scale in scales(model).items())


@pytest.mark.parametrize("exponent", [-200.0, 127.4, 200.0])
def test_a_scale_that_has_diverged_is_no_error_of_its_own(exponent: float):
    """In training the quantizer itself says so, with what to do, where float32 has no such number."""
    model = prepared()
    with torch.no_grad():
        model.head.activation_quantizer.log2_scale.fill_(exponent)
    expected = ["head.activation_quantizer"] if exponent < 0 else []
    assert renew_outgrown_ranges(model, ((X,), {})) == expected


class Levels(nn.Module):
    """A head that Python code calls for each of two levels, of which the second has small values."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [self.head(factor * x) for factor in (1.0, 0.01)]


def test_what_is_cut_off_in_any_call_of_a_quantizer_counts():
    model = calibrate(prepare_qat(Levels().eval(), QATConfig(), {"x": X}), [{"x": X}]).train()
    with torch.no_grad():
        model.head[0].weight *= 8
    assert "head.0.activation_quantizer" in renew_outgrown_ranges(model, ((), {"x": X}), trained=True)


@pytest.mark.parametrize("change", ["frozen", "requires_grad"])
def test_ranges_that_are_not_to_change_do_not(change: str):
    model = prepared()
    for quantizer in fake_quantizers(model).values():
        if change == "frozen":
            quantizer.frozen = True
        else:
            quantizer.requires_grad_(False)
    with torch.no_grad():
        model.head.weight *= 8
    assert renew_outgrown_ranges(model, ((X,), {})) == []


def test_the_latest_call_in_training_is_noted_while_it_is_listened_to():
    model, (first, second, third) = Net(), X.view(4, 4, 8)[:3]
    call = CallInTraining(model)
    model(first)
    assert call.take() is None
    call.listen()
    model(first)
    model(x=second)
    model.eval()(third)
    assert call.take() == ((), {"x": second})
    model.train()(third)
    assert call.take() is None


class Denoising(Net):
    """With labels it sees every input twice, the second time far off, as detectors do in training."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if labels is None else torch.cat([x, 20 * x]))


def test_what_only_labels_bring_into_training_makes_no_range_wider():
    model = Denoising()
    model(X)
    labels = torch.zeros(len(X), dtype=torch.int64)
    model = calibrate(prepare_qat(model, QATConfig(), {"x": X, "labels": labels}), [X]).train()
    before = scales(model)
    assert renew_outgrown_ranges(model, ((), {"x": X, "labels": labels})) == []
    assert all(torch.equal(before[path], scale) for path, scale in scales(model).items())
    with torch.no_grad():
        model.head.weight *= 20
    assert renew_outgrown_ranges(model, ((), {"x": X, "labels": labels}))
    assert model.training and all(module.training for module in model.modules())


class Supervised(Net):
    """Cannot do without labels."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + labels


def test_labels_that_forward_insists_on_are_given():
    model = Supervised()
    model(X, torch.zeros(4))
    model = calibrate(prepare_qat(model, QATConfig(), (X, torch.zeros(16, 4))), [(X, torch.zeros(16, 4))]).train()
    with torch.no_grad():
        model.head.weight *= 8
    assert "head.activation_quantizer" in renew_outgrown_ranges(model, ((), {"x": X, "labels": torch.zeros(16, 4)}))


@torch.no_grad()
def test_what_the_first_ranges_clip_on_purpose_has_not_grown():
    """At two bits, the least error clips more than a tenth of the values of a normal distribution."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64))
    twin = copy.deepcopy(model)
    config = QATConfig(activations={"bits": 2, "observer": "mse"})
    calibrate(prepare_qat(model, config, x), [x], bias_correction=False).train()
    last = fake_quantizers(model)["2.activation_quantizer"]
    low, high = ((code - float(last.zero_point)) * float(last.scale) for code in (last.spec.qmin, last.spec.qmax))
    values = twin(x)
    assert ((values < low) | (values > high)).float().mean() > 0.1
    assert renew_outgrown_ranges(model, ((x,), {})) == []
    model[2].weight += 1e-3 * torch.randn(64, 64)
    assert renew_outgrown_ranges(model, ((x,), {})) == []


def test_of_few_values_the_least_error_jumps_and_the_weight_has_not_grown():
    """Rounded to −s, 0 and s, 1 and 0.34 lose 0.16 + 0.0676 at s = 0.6, 0.1156 at 1 and 0.81 + 0.0576 at 0.1."""
    weight = torch.tensor([[1.0, 0.34, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]).repeat(4, 1)
    for scale, expected in ((0.6, []), (0.1, ["head.weight_quantizer"])):
        model = prepared(weights={"bits": 2, "observer": "mse"})
        with torch.no_grad():
            model.head.weight.copy_(weight)
        model.head.weight_quantizer.set_qparams(torch.full((4,), scale))
        assert [path for path in renew_outgrown_ranges(model, ((X,), {})) if "weight" in path] == expected


def test_a_training_whose_weights_have_diverged_goes_on():
    model = prepared()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    assert renew_outgrown_ranges(model, ((X,), {})) == []


@pytest.mark.parametrize(
    ("grows", "exponent"),
    [(1.01, -6), (1.1, -6), (1.9, -5), (2.1, -4), (4.0, -4), (4.1, -3)],
    ids=lambda grown: str(grown),
)
def test_a_power_of_two_that_data_have_passed_by_a_little_has_not_grown_and_one_that_has_holds_them(grows, exponent):
    """The codes -128 to 127 times 2**-6 hold 127/64, times 2**-5 twice as much, and so on."""
    largest = 127 / 64
    x = torch.linspace(-largest, largest, 64).view(8, 8)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    nn.init.eye_(model[0].weight)
    activations = {"observer": "minmax"}
    calibrate(prepare_qat(model, QATConfig("TDA4VM", activations=activations), x), [x], bias_correction=False).train()
    quantizer = fake_quantizers(model)["0.activation_quantizer"]
    assert quantizer.scale == 2**-6
    renew_outgrown_ranges(model, ((grows * x,), {}))
    assert quantizer.scale == 2.0**exponent


@pytest.mark.parametrize("target", ["int8", "AM68A", "TDA4VM"])
@pytest.mark.parametrize("narrower", [1.0, 1.9])
def test_of_a_trained_model_what_training_has_clipped_stays_clipped_and_a_head_without_ranges_gets_them(
    target: str, narrower: float
):
    """Few values lie beyond: those of one row in 128."""
    x = X.repeat(8, 1)
    x[0] *= 4
    model = Net()
    model(x)
    model = calibrate(prepare_qat(model, QATConfig(target, activations={"observer": "minmax"}), x), [x]).train()
    with torch.no_grad():
        for path, quantizer in fake_quantizers(model).items():
            if not path.endswith("weight_quantizer") and quantizer.log2_scale.requires_grad:
                quantizer.log2_scale -= torch.tensor(narrower).log2().round(decimals=0 if target == "TDA4VM" else 7)
    before = scales(model)
    assert renew_outgrown_ranges(model, ((x,), {}), trained=True) == []
    assert all(torch.equal(before[path], scale) for path, scale in scales(model).items())
    with torch.no_grad():
        model.head.weight *= 16
        model.head.bias *= 16
    assert "head.activation_quantizer" in renew_outgrown_ranges(model, ((x,), {}), trained=True)
