"""One export of a tiny trained model, and what was measured on the way: what most tests of this room look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import nn
from transformers import EvalPrediction, ViTImageProcessorPil

from hf_qat.trainer.trainer import QATTrainer
from tests.models import LABELS, spread
from tests.training import images, trainer_of


#: A base model that could be on the Hub; nothing is asked of it.
BASE = "somebody/tiny-resnet"


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images, 0 to 1."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def tiny_resnet() -> nn.Module:
    """A stem, one block and a classifier, loaded from `BASE` as far as its config knows."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=LABELS, out_features=["stage1"]
    )
    model = spread(transformers.ResNetForImageClassification(config))
    model.config._name_or_path = BASE
    return model


def processor(size: int = 32) -> ViTImageProcessorPil:
    """From images to the size of the test images."""
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )


def publisher(directory: Path, target: str, **changes: object) -> QATTrainer:
    """A trainer of `tiny_resnet`, with a processor and a metric."""
    qat = {"target": target, **changes.pop("qat", {})}  # type: ignore[dict-item]
    changes = {"compute_metrics": accuracy, "processing_class": processor(), "learning_rate": 0.01, **changes}
    model = changes.pop("model", None) or tiny_resnet()
    return trainer_of(model, directory, qat=qat, eval_dataset=images(50, seed=1), **changes)


def run(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Logits of an ONNX file on ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options).run(None, {"pixel_values": pixels})[0]


@dataclass(frozen=True)
class Exported:
    """A trainer after its training, what it exported, and what `evaluate` gave before and after."""

    trainer: QATTrainer
    directory: Path
    calibrated: float
    trained: float
    pixels: torch.Tensor
    labels: np.ndarray


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    directory = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    trainer = publisher(directory / "run", "AM68A", max_steps=24)
    trainer.calibrate()
    calibrated = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    trained = trainer.evaluate()["eval_accuracy"]
    result = trainer.export(
        directory / "tiny",
        metrics={"float": {"eval_accuracy": 0.875, "eval_loss": 0.3, "eval_runtime": 1.0, "epoch": 3.0}},
        tags="tests",
        license="apache-2.0",
    )
    assert result == directory / "tiny"
    rows = trainer.eval_dataset[:]
    return Exported(trainer, result, calibrated, trained, rows["pixel_values"], rows["labels"].numpy())
