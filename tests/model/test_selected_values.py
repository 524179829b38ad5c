"""Models whose Python code selects by a score: how many values pass depends on the images, and on rounding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, analyze, calibrate, prepare_qat
from hf_qat.model import reconstruction
from hf_qat.model.analysis.noise import outputs_sqnr


class Selecting(nn.Module):
    """Refines those rows whose score is above a threshold, in a part of its own."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.score, self.box = nn.Sequential(nn.Linear(16, 1)), nn.Sequential(nn.Linear(16, 4))
        self.threshold = threshold

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        features = self.body(x)
        scores = self.score(features)[..., 0]
        return {"scores": scores, "boxes": self.box(features[scores > self.threshold])}


@pytest.fixture
def model() -> Selecting:
    torch.manual_seed(0)
    return Selecting().eval()


@pytest.fixture
@torch.no_grad()
def batches(model: Selecting) -> list[dict[str, Tensor]]:
    """Of the first two, half of the rows pass; of the third, none does."""
    x = torch.randn(6, 50, 8)
    scores = model(x)["scores"]
    zeros = torch.zeros(2, 50, 8)
    model.threshold = max(float(scores.median()), float(model(zeros)["scores"].max()) + 0.1)
    return [{"x": x[:3]}, {"x": x[3:]}, {"x": zeros}]


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_batch_of_which_nothing_is_selected_changes_no_bias(model, batches, effort, monkeypatch):
    monkeypatch.setattr(reconstruction, "STEPS", 12)
    errors = []
    for given in (batches[:2], [batches[2], *batches[:2]]):
        prepared = calibrate(prepare_qat(copy.deepcopy(model), QATConfig(), batches[0]), given, effort=effort)
        features = model.body(batches[0]["x"])
        with torch.no_grad():
            features = features[model.score(features)[..., 0] > model.threshold]
            errors.append(float((prepared.box(features) - model.box(features)).norm() / model.box(features).norm()))
    assert errors[1] < 1.3 * errors[0] < 0.1


def test_what_is_selected_by_chance_of_rounding_is_no_error_of_analysis(model, batches):
    prepared = prepare_qat(copy.deepcopy(model), QATConfig(weights={"bits": 3}), batches[0])
    calibrate(prepared, batches, bias_correction=False)
    with torch.no_grad():
        found, wanted = prepared(**batches[0]), model(**batches[0])
    assert found["boxes"].shape != wanted["boxes"].shape
    report = analyze(prepared, batches[:1])
    scores, exact = found["scores"].double(), wanted["scores"].double()
    expected = 10 * math.log10(exact.square().sum() / (scores - exact).square().sum())
    assert report.output_sqnr == pytest.approx(expected, abs=0.01)
    assert min(layer.only_quantized for layer in report.layers) < 30
    assert {layer.path: layer.sqnr for layer in report.layers}["box.0"] == -math.inf


class Anchors(nn.Module):
    """As RT-DETR: proposals at the border have the largest float in place of coordinates."""

    def __init__(self, none: float) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.none = none

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.part(x).masked_fill(torch.arange(x.shape[1])[:, None] == 0, self.none)


@pytest.mark.parametrize("none", [torch.finfo(torch.float32).max, math.inf, -math.inf, math.nan])
def test_outputs_that_stand_for_no_value_are_no_signal(none):
    torch.manual_seed(0)
    model, x = Anchors(none).eval(), torch.randn(6, 50, 8)
    prepared = prepare_qat(copy.deepcopy(model), QATConfig(weights={"bits": 4}), {"x": x})
    calibrate(prepared, [{"x": x}], bias_correction=False)
    with torch.no_grad():
        found, wanted = (of(x)[:, 1:].double() for of in (prepared, model))
    noise = (found - wanted).square().sum()
    report = analyze(prepared, [{"x": x}])
    assert report.output_sqnr == pytest.approx(10 * math.log10(wanted.square().sum() / noise), abs=0.01)
    assert all(10 < layer.only_quantized < 80 for layer in report.layers)
    centred = (wanted - wanted.mean()).square().sum()
    assert outputs_sqnr(prepared, [{"x": x}]) == pytest.approx(10 * math.log10(centred / noise), abs=0.01)
