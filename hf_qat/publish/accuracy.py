"""What was measured of a model, stage by stage: only figures that an evaluation gave, by the names of its metrics."""

from __future__ import annotations

from collections.abc import Mapping

from hf_qat.config.targets import did_you_mean
from hf_qat.errors import ConfigError


#: The stages that a card tells apart, in its order, and what it calls them.
STAGES = {
    "float": "float, before quantization",
    "calibrated": "quantized by calibration alone",
    "qat": "quantized, after training (QAT)",
    "quantized": "quantized, as it was given",
    "onnxruntime": "`onnx/model.onnx` on ONNX Runtime",
}

#: What Trainer puts before the name of every metric.
PREFIX = "eval_"

#: What Trainer adds to the metrics of the user: how long it took, not how good the model is.
NO_QUALITY = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")

#: Stage → name of a metric → its value.
Accuracy = dict[str, dict[str, float]]


def quality(evaluated: Mapping[str, object]) -> dict[str, float]:
    """The user's own metrics among what `Trainer.evaluate` returns, without its prefix.

    Args:
        evaluated: from `evaluate`, or metrics by their plain names. Losses are left out: ONNX Runtime computes none.
    """
    plain = {name.removeprefix(PREFIX): value for name, value in evaluated.items()}
    return {
        name: float(value)
        for name, value in plain.items()
        if isinstance(value, (int, float)) and name != "epoch" and not name.endswith(NO_QUALITY)
    }


def given_accuracy(metrics: Mapping[str, Mapping[str, object]] | None) -> Accuracy:
    """What a user has measured, checked.

    Args:
        metrics: stage → what `evaluate` returned there. `onnxruntime` is not taken: export measures that.

    Raises:
        ConfigError: an unknown stage, or no number in one.
    """
    accuracy: Accuracy = {}
    for stage, evaluated in (metrics or {}).items():
        if stage not in STAGES or stage == "onnxruntime":
            known = [name for name in STAGES if name != "onnxruntime"]
            raise ConfigError(
                f"metrics: {stage!r} is no stage that can be given.{did_you_mean(stage, known)} Known stages: "
                f'{", ".join(known)}; for instance metrics={{"float": float_trainer.evaluate()}}.'
            )
        found = quality(evaluated) if isinstance(evaluated, Mapping) else {}
        if not found:
            raise ConfigError(
                f"metrics[{stage!r}] holds no metric: give what evaluate() returned, such as "
                '{"eval_accuracy": 0.97}, from a Trainer with compute_metrics.'
            )
        accuracy[stage] = found
    return accuracy
