"""Image classification: an integer for each image; measured by accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_qat.cli.tasks.classes import Classes, classes_of


def classes(processor: Any, dataset: Any, column: str) -> Classes:
    """Those that the column names or numbers; the processor is not needed."""
    return classes_of(dataset.features[column], dataset[column])


def renumbered(label: Any, number_of: Callable[[object], int]) -> int:
    """The label's number of the model."""
    return number_of(label)


def encode(processor: Any, images: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """Pixels, and the number of the class if there is one."""
    pixels = dict(processor(images, return_tensors="pt"))
    return {**pixels, "labels": list(labels)} if labels else pixels


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """(N, 3, H, W) pixels and (N,) labels."""
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.int64)
    return batch


def metrics(processor: Any, prediction: Any) -> dict[str, float]:
    """Accuracy, as a share; the processor is not needed."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.asarray(logits).argmax(-1) == np.asarray(prediction.label_ids)).mean())}
