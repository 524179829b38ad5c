"""A net from scratch and a new head, with defaults only: as accurate as with Trainer after the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_qat.trainer.trainer import QATTrainer
from tests.exported import accuracy
from tests.training import arguments


TRAIN, TEST = slice(0, 1200), slice(1200, None)

#: Accuracy, as a share, by which the mean of ours may be below the float one: 1 point.
MARGIN = 0.01

#: One seed is a point from the next, and a vision transformer, which is on its way after ten epochs, several.
SEEDS = range(3)

pytestmark = pytest.mark.slow


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 3, 32, 32) float32 and (1797,) int64, in random order."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    pixels = nn.functional.interpolate(pixels, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], torch.tensor(data.target)[order]


def rows(part: slice, classes: int = 10) -> list[dict[str, Any]]:
    pixels, labels = digits()
    pairs = zip(pixels[part], labels[part].tolist(), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs if label < classes]


def maps(part: slice) -> list[dict[str, Any]]:
    """Background, and three classes of strokes: the digit modulo 3."""
    pixels, labels = digits()
    strokes = nn.functional.interpolate(pixels[part, :1], size=32)[:, 0] > -0.2
    found = torch.where(strokes, 1 + labels[part][:, None, None] % 3, 0)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels[part], found, strict=True)]


def pixel_accuracy(prediction: Any) -> dict[str, float]:
    scores = nn.functional.interpolate(torch.as_tensor(prediction.predictions), size=32)
    return {"accuracy": float((scores.argmax(1).numpy() == prediction.label_ids).mean())}


def resnet(classes: int = 10) -> nn.Module:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=classes
    )
    return ResNetForImageClassification(config)


def segformer() -> nn.Module:
    config = SegformerConfig(
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=32,
        num_labels=4,
    )
    return SegformerForSemanticSegmentation(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def mean_accuracies(
    make: Callable[[], nn.Module], directory: Path, epochs: int, lr: float, **data: Any
) -> tuple[float, float]:
    """After training with Trainer and with ours: from the same weights, on the same batches, and over all `SEEDS`."""
    plain, ours = (
        [accuracy_of(kind, make, seed, directory, epochs, lr, **data) for seed in SEEDS]
        for kind in (Trainer, QATTrainer)
    )
    return fmean(plain), fmean(ours)


def accuracy_of(
    kind: type[Trainer],
    make: Callable[[], nn.Module],
    seed: int,
    directory: Path,
    epochs: int,
    lr: float,
    **data: Any,
) -> float:
    """Of one training; `seed` draws the weights, and the order of the images."""
    torch.manual_seed(seed)
    args = arguments(
        directory,
        max_steps=-1,
        num_train_epochs=epochs,
        learning_rate=lr,
        seed=seed,
        logging_steps=100,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
    )
    trainer = kind(make(), args, **data)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def test_a_net_from_scratch(tmp_path: Path):
    data = {"train_dataset": rows(TRAIN), "eval_dataset": rows(TEST), "compute_metrics": accuracy}
    plain, ours = mean_accuracies(resnet, tmp_path, 5, 3e-3, **data)
    assert plain > 0.95 and ours >= plain - MARGIN


def test_a_vision_transformer_from_scratch_at_a_high_learning_rate(tmp_path: Path):
    data = {"train_dataset": rows(TRAIN), "eval_dataset": rows(TEST), "compute_metrics": accuracy}
    plain, ours = mean_accuracies(vit, tmp_path, 10, 2e-3, **data)
    assert plain > 0.65 and ours >= plain - MARGIN


def test_a_new_head(tmp_path: Path):
    """A net that has learned the digits below 5 learns all ten."""
    torch.manual_seed(1)
    args = arguments(tmp_path, max_steps=57, learning_rate=3e-3, per_device_train_batch_size=32)
    trainer = Trainer(resnet(5), args, train_dataset=rows(TRAIN, classes=5))
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "five")

    def load() -> nn.Module:
        cls = ResNetForImageClassification
        return cls.from_pretrained(tmp_path / "five", num_labels=10, ignore_mismatched_sizes=True)

    data = {"train_dataset": rows(TRAIN), "eval_dataset": rows(TEST), "compute_metrics": accuracy}
    plain, ours = mean_accuracies(load, tmp_path, 6, 2e-3, **data)
    assert plain > 0.95 and ours >= plain - MARGIN


def test_a_segmentation_net_from_scratch(tmp_path: Path):
    data = {"train_dataset": maps(TRAIN), "eval_dataset": maps(TEST), "compute_metrics": pixel_accuracy}
    plain, ours = mean_accuracies(segformer, tmp_path, 4, 2e-3, **data)
    assert plain > 0.85 and ours >= plain - MARGIN
