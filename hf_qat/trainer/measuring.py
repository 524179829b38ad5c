"""What was measured of a model, and when: by `evaluate` on the way, and at an export by ONNX Runtime too."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_qat.export.runtime_model import RuntimeModel
from hf_qat.model.state import state_of
from hf_qat.publish.accuracy import PREFIX, Accuracy, user_metrics
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.batches import evaluates_other_sizes
from hf_qat.trainer.callbacks import needs_calibration


logger = logging.get_logger(__name__)


@dataclass
class Record:
    """What is known of the model that a trainer has.

    Attributes:
        from_float: it came float, or without ranges: not quantized by somebody else.
        trained: an earlier `train()` has made a step with it.
        accuracy: what `evaluate` gave before and after training, by the keys of `hf_qat.publish.accuracy.MEASURED_AS`.
    """

    from_float: bool = True
    trained: bool = False
    accuracy: Accuracy = field(default_factory=dict)

    def measured_as(self, model: nn.Module, steps: int) -> str | None:
        """The key of `MEASURED_AS` for what is measured of a model now, after so many steps of the current training.

        `None` while it has no ranges to round by.
        """
        if self.trained or steps > 0:
            return "qat"
        if not self.from_float:
            return "quantized"
        if not needs_calibration(model):
            return "calibrated"
        return None if any(quantizer.enabled for quantizer in fake_quantizers(model).values()) else "float"

    def note(self, stage: str | None, metrics: Mapping[str, float]) -> None:
        """Keep what `evaluate` gave on the own evaluation set; of a model that came quantized, nothing."""
        found = user_metrics(metrics)
        if found and stage in ("float", "calibrated", "qat"):
            self.accuracy[stage] = found


def reset_record(model: nn.Module) -> Record:
    """A new record, of a model that is not prepared yet, or was by the user."""
    return Record(from_float=state_of(model) is None or needs_calibration(model))


def measure(
    trainer: Trainer, stage: str, converted: nn.Module, path: Path | None, example: Mapping[str, Any] | None = None
) -> Accuracy:
    """The user's metrics of a trainer's model as it is now, and of the file that it was exported to.

    All processes take part.

    Args:
        trainer: evaluates both.
        stage: what was done to its model.
        converted: what the file was exported from.
        path: the file; in the main process.
        example: inputs of the size that the file takes; images of evaluation of another are no matter of the file.

    Returns:
        Stage → name of a metric → its value; nothing without metrics or an evaluation set.
    """
    if trainer.compute_metrics is None or trainer.eval_dataset is None:
        return {}
    accuracy = {stage: _metrics(trainer)}
    if example is not None and evaluates_other_sizes(trainer, converted, example):
        logger.warning("The file is not evaluated: images of evaluation have other sizes than it takes.")
        return {stage: metrics for stage, metrics in accuracy.items() if metrics}
    with _file_everywhere(trainer, path) as file:
        accuracy["onnxruntime"] = _metrics(_with_model(trainer, RuntimeModel(converted, file).eval()))
    return {stage: metrics for stage, metrics in accuracy.items() if metrics}


def evaluation_images(trainer: Trainer) -> int:
    """How many there are in the evaluation set; 0 if that is not known, or there is none."""
    return sum(len(part) for part in _evaluation_sets(trainer).values() if has_length(part))


def _with_model(trainer: Trainer, model: nn.Module) -> Trainer:
    """A trainer that has everything in common with `trainer` but the model: its evaluation is the user's own."""
    trainer._set_signature_columns_if_needed()  # the columns are those that forward of its own model takes
    other = copy.copy(trainer)
    other.model = model
    return other


def _metrics(trainer: Trainer) -> dict[str, float]:
    """By the names that `evaluate` gives them, but neither logged nor seen by callbacks that stop or save."""
    metrics: dict[str, float] = {}
    for prefix, part in _evaluation_sets(trainer).items():
        metrics.update(user_metrics(trainer.predict(part, metric_key_prefix=prefix).metrics or {}))
    return metrics


def _evaluation_sets(trainer: Trainer) -> Mapping[str, Dataset[Any]]:
    """By what stands before the names of their metrics."""
    if isinstance(trainer.eval_dataset, dict):
        return {f"{PREFIX}{name}": part for name, part in trainer.eval_dataset.items()}
    return {} if trainer.eval_dataset is None else {PREFIX.rstrip("_"): trainer.eval_dataset}


@contextmanager
def _file_everywhere(trainer: Trainer, path: Path | None) -> Iterator[Path]:
    """A file of the main process, in every process; it may be on another machine."""
    if trainer.args.world_size == 1:
        assert path is not None
        yield path
        return
    content = broadcast_object_list([None if path is None else path.read_bytes()])[0]
    with tempfile.TemporaryDirectory() as directory:
        copied = Path(directory) / "model.onnx"
        copied.write_bytes(content)
        yield copied
