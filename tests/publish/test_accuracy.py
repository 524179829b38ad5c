from __future__ import annotations

import pytest

from hf_qat.errors import ConfigError
from hf_qat.publish.accuracy import given_accuracy, user_metrics


def test_only_the_metrics_of_the_user_are_kept_under_their_own_names():
    evaluated = {
        "eval_accuracy": 0.5,
        "eval_map_50": 1,
        "mean_iou": 0.25,
        "eval_loss": 0.1,
        "eval_loss_bbox_loss": 0.1,
        "eval_runtime": 1.0,
        "eval_samples_per_second": 3.0,
        "eval_steps_per_second": 3.0,
        "eval_model_preparation_time": 0.1,
        "eval_names": "text",
        "epoch": 2.0,
    }
    assert user_metrics(evaluated) == {"accuracy": 0.5, "map_50": 1.0, "mean_iou": 0.25}


def test_what_was_measured_elsewhere_is_taken_row_by_row():
    given = {"float": {"eval_accuracy": 0.9, "epoch": 1.0}, "qat": {"accuracy": 0.8}}
    assert given_accuracy(given) == {"float": {"accuracy": 0.9}, "qat": {"accuracy": 0.8}}
    assert given_accuracy(None) == {}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            {"flaot": {"accuracy": 1}},
            "'flaot' .*Did you mean 'float'.* Known stages: float, calibrated, qat, quantized",
        ),
        ({"onnxruntime": {"accuracy": 1}}, "'onnxruntime' is no stage that can be given"),
        ({"float": {"eval_loss": 0.3}}, r"metrics\['float'\] holds no metric"),
        ({"float": 0.97}, r"metrics\['float'\] holds no metric"),
    ],
)
def test_what_is_no_measurement_is_refused(metrics: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        given_accuracy(metrics)
