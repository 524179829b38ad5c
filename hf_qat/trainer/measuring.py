"""`MeasuringTrainer`: remembers what `evaluate` gave at which stage, and evaluates exported files on ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_qat.export.runtime_model import RuntimeModel
from hf_qat.model.state import state_of
from hf_qat.publish.accuracy import PREFIX, Accuracy, quality
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.callbacks import needs_calibration


class MeasuringTrainer(Trainer):
    """A Trainer that knows at which stage its model is, and what was measured there.

    Only `evaluate()` on the trainer's own evaluation set counts: figures of one card are of one data set.
    """

    model: nn.Module
    _runtime: nn.Module | None = None

    def reset_record(self, model: nn.Module) -> None:
        """Begin anew with a model, before it is prepared."""
        self._accuracy: Accuracy = {}
        self._from_float = state_of(model) is None or needs_calibration(model)
        self._trained = False

    def stage(self) -> str | None:
        """What was done to the model, a key of `hf_qat.publish.accuracy.STAGES`; `None` while it has no ranges."""
        if self._trained or self.state.global_step > 0:
            return "qat"
        if not self._from_float:
            return "quantized"
        if not needs_calibration(self.model):
            return "calibrated"
        quantizers = fake_quantizers(self.model).values()
        return None if any(quantizer.enabled for quantizer in quantizers) else "float"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._trained = self._trained or self.state.global_step > 0

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As Trainer's; what it gives on the own evaluation set before training will stand in the model card.

        Within `fake_quant_disabled(trainer.model)`, before calibration, that is the accuracy of the float model.
        """
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        stage = self.stage()
        if eval_dataset is None and metric_key_prefix == "eval" and stage in ("float", "calibrated"):
            self._accuracy[stage] = quality(metrics)
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As Trainer's; while an exported file is measured, it computes instead of the model."""
        computing = model if self._runtime is None else self._runtime
        return super().prediction_step(computing, inputs, prediction_loss_only, ignore_keys)

    def measured(self, converted: nn.Module, path: Path | None) -> Accuracy:
        """The user's metrics of the model as it is now, and of the file that it was exported to.

        All processes take part.

        Args:
            converted: what the file was exported from.
            path: the file; in the main process.

        Returns:
            What is known, by stage; without metrics or an evaluation set, only what was noted before.
        """
        accuracy = dict(self._accuracy)
        if self.compute_metrics is None or self.eval_dataset is None:
            return accuracy
        stage = self.stage()
        if stage is not None:
            accuracy[stage] = self._metrics()
        with self._file_everywhere(path) as file:
            self._runtime = RuntimeModel(converted, file).eval()
            try:
                accuracy["onnxruntime"] = self._metrics()
            finally:
                self._runtime = None
        return {stage: metrics for stage, metrics in accuracy.items() if metrics}

    def evaluation_images(self) -> int:
        """How many there are in the evaluation set; 0 if that is not known, or there is none."""
        return sum(len(part) for part in self._evaluation_sets().values() if has_length(part))

    def _evaluation_sets(self) -> Mapping[str, Dataset]:
        """By what stands before the names of their metrics."""
        if isinstance(self.eval_dataset, dict):
            return {f"{PREFIX}{name}": part for name, part in self.eval_dataset.items()}
        return {} if self.eval_dataset is None else {PREFIX.rstrip("_"): self.eval_dataset}

    def _metrics(self) -> dict[str, float]:
        """By the names that `evaluate` gives them, but neither logged nor seen by callbacks that stop or save."""
        metrics: dict[str, float] = {}
        for prefix, part in self._evaluation_sets().items():
            metrics.update(quality(self.predict(part, metric_key_prefix=prefix).metrics or {}))
        return metrics

    @contextmanager
    def _file_everywhere(self, path: Path | None) -> Iterator[Path]:
        """A file of the main process, in every process; it may be on another machine."""
        if self.args.world_size == 1:
            assert path is not None
            yield path
            return
        content = broadcast_object_list([None if path is None else path.read_bytes()])[0]
        with tempfile.TemporaryDirectory() as directory:
            copied = Path(directory) / "model.onnx"
            copied.write_bytes(content)
            yield copied
