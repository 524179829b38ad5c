"""Turning codes and drifting ranges, against what numbers set by hand must give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_qat import calibrate, prepare_qat
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.histories import CodeHistory, RangeHistory, activation_reaches
from tests.models import resnet
from tests.training import prepared, recipe, trainer_of


def linear() -> nn.Module:
    model = prepare_qat(nn.Sequential(nn.Linear(10, 2)), recipe(), torch.randn(2, 10))
    calibrate(model, [torch.randn(4, 10)], bias_correction=False)
    set_codes(model, 0)
    return model


def set_codes(model: nn.Module, *codes: float) -> None:
    """The first weights of the first row; all others stay."""
    layer = model.get_submodule("0")
    with torch.no_grad():
        layer.weight_quantizer.set_qparams(torch.full((2,), 0.5))
        for column, code in enumerate(codes):
            layer.weight[0, column] = 0.5 * code


@pytest.mark.parametrize(
    ("seen", "turned"),
    [
        ([(3,), (3,), (3,)], [0, 0, 0]),
        ([(3,), (4,), (5,)], [0, 0, 0]),  # goes on in its way
        ([(3,), (4,), (3,)], [0, 0, 1]),
        ([(3,), (4,), (3,), (4,)], [0, 0, 1, 1]),
        ([(3,), (4,), (4,), (3,)], [0, 0, 0, 1]),  # what counts is the last change, however long ago
        ([(3.4,), (3.6,), (3.4,)], [0, 0, 1]),  # the edge lies at 3.5
        ([(3.1,), (3.3,), (3.1,)], [0, 0, 0]),
        ([(3, 1), (4, 2), (3, 1)], [0, 0, 2]),
    ],
    ids=str,
)
def test_a_weight_has_turned_when_its_code_goes_back_the_way_it_came(seen, turned):
    model, history = linear(), CodeHistory()
    shares = []
    for codes in seen:
        set_codes(model, *codes)
        shares.append(history.share_turned(model).item())
    assert shares == [pytest.approx(count / 20) for count in turned]


def test_reaches_are_those_of_the_codes():
    model = linear()
    reaches = activation_reaches(model)
    for path, reach in reaches.items():
        quantizer = fake_quantizers(model)[path]
        zero = 0 if quantizer.zero_point is None else round(quantizer.zero_point.item())
        low, high = ((code - zero) * quantizer.scale.item() for code in (quantizer.spec.qmin, quantizer.spec.qmax))
        assert reach == pytest.approx(max(-low, high))
    assert reaches and "0.weight_quantizer" not in reaches


def test_ranges_are_kept_at_every_log_of_the_loss(tmp_path: Path):
    history = RangeHistory()
    trainer = trainer_of(
        prepared(resnet), tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", callbacks=[history]
    )
    trainer.train()
    assert history.steps == [2, 4]
    assert history.ranges.keys() == activation_reaches(trainer.model).keys()
    assert {path: found[-1] for path, found in history.ranges.items()} == pytest.approx(
        activation_reaches(trainer.model)
    )
