"""What is noted of an evaluation, and of which one; what ONNX Runtime is asked is in test_publishing.py."""

from pathlib import Path

import pytest
import torch

from hf_qat.model.calibration import calibrate
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.trainer.measuring import Record, evaluation_images, measure, reset_record
from tests.models import hand_written, resnet
from tests.training import images, prepared, recipe, trainer_of


def test_a_model_goes_through_the_stages_of_a_card():
    model, pixels = hand_written(), torch.randn(4, 3, 16, 16)
    record = reset_record(model)
    prepare_qat(model, recipe(), pixels)
    assert record.measured_as(model, 0) is None
    with fake_quant_disabled(model):
        assert record.measured_as(model, 0) == "float"
    calibrate(model, [pixels])
    assert record.measured_as(model, 0) == "calibrated"
    assert record.measured_as(model, 1) == "qat"
    record.trained = True
    assert record.measured_as(model, 0) == "qat"  # a second training is about to begin


def test_a_model_that_came_with_ranges_is_not_called_calibrated():
    model, pixels = prepare_qat(hand_written(), recipe(), torch.randn(4, 3, 16, 16)), torch.randn(4, 3, 16, 16)
    assert reset_record(model).from_float  # prepared only
    record = reset_record(calibrate(model, [pixels]))
    assert record.measured_as(model, 0) == "quantized" and record.measured_as(model, 5) == "qat"


def test_only_metrics_of_the_user_are_noted_of_a_model_that_came_float():
    record = Record()
    metrics = {"eval_accuracy": 0.5, "eval_loss": 2.0, "eval_runtime": 1.0, "epoch": 1.0}
    for stage in (None, "quantized"):
        record.note(stage, metrics)
    assert record.accuracy == {}
    record.note("float", {"eval_loss": 2.0})
    assert record.accuracy == {}
    record.note("calibrated", metrics)
    assert record.accuracy == {"calibrated": {"accuracy": 0.5}}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, 0),
        (images(6), 6),
        ({"one": images(6), "two": images(3)}, 9),
        ({"one": images(6), "two": images(3).to_iterable_dataset()}, 6),
    ],
    ids=["none", "one", "two", "a stream"],
)
def test_images_of_the_evaluation_are_counted_as_far_as_is_known(tmp_path: Path, data: object, expected: int):
    assert evaluation_images(trainer_of(prepared(resnet), tmp_path, eval_dataset=data)) == expected


def test_without_metrics_nothing_is_measured(tmp_path: Path):
    trainer = trainer_of(prepared(resnet), tmp_path)
    trainer.calibrate()
    assert measure(trainer, "calibrated", trainer.convert(), Path("no such file")) == {}
