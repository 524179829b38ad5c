"""What was measured of a model before and after each step: figures that an evaluation gave, by their own names."""

from __future__ import annotations

from collections.abc import Mapping

from hf_qat.config.targets import did_you_mean
from hf_qat.errors import ConfigError


#: What a model, or its file, was measured as → what a card calls that, in its order.
MEASURED_AS = {
    "float": "float, before quantization",
    "calibrated": "quantized by calibration alone",
    "qat": "quantized, after training (QAT)",
    "quantized": "quantized, as it was given",
    "onnxruntime": "`onnx/model.onnx` on ONNX Runtime",
}

#: What Trainer puts before the name of every metric.
PREFIX = "eval_"

#: What Trainer adds to the metrics of the user: how long it took, not how good the model is.
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")

#: Measured as → name of a metric → its value.
Accuracy = dict[str, dict[str, float]]


def quality(evaluated: Mapping[str, object]) -> dict[str, float]:
    """What `Trainer.evaluate` returns without its prefix, and without times: the loss, and the user's own metrics.

    Args:
        evaluated: from `evaluate`, or metrics by their plain names.
    """
    plain = {name.removeprefix(PREFIX): value for name, value in evaluated.items()}
    return {
        name: float(value)
        for name, value in plain.items()
        if isinstance(value, (int, float)) and name != "epoch" and not name.endswith(TIMES)
    }


def user_metrics(evaluated: Mapping[str, object]) -> dict[str, float]:
    """`quality` without losses: ONNX Runtime computes none."""
    return {name: value for name, value in quality(evaluated).items() if not name.endswith("loss")}


def given_accuracy(metrics: Mapping[str, Mapping[str, object]] | None) -> Accuracy:
    """What a user has measured, checked.

    Args:
        metrics: measured as → what `evaluate` returned. `onnxruntime` is not taken: export measures that.

    Raises:
        ConfigError: unknown to `MEASURED_AS`, or no number in one.
    """
    accuracy: Accuracy = {}
    for measured_as, evaluated in (metrics or {}).items():
        if measured_as not in MEASURED_AS or measured_as == "onnxruntime":
            known = [name for name in MEASURED_AS if name != "onnxruntime"]
            raise ConfigError(
                f"metrics: {measured_as!r} is no stage that can be given.{did_you_mean(measured_as, known)} "
                f'Known stages: {", ".join(known)}; for instance metrics={{"float": float_trainer.evaluate()}}.'
            )
        found = user_metrics(evaluated) if isinstance(evaluated, Mapping) else {}
        if not found:
            raise ConfigError(
                f"metrics[{measured_as!r}] holds no metric: give what evaluate() returned, such as "
                '{"eval_accuracy": 0.97}, from a Trainer with compute_metrics.'
            )
        accuracy[measured_as] = found
    return accuracy
