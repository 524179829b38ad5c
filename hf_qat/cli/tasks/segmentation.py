"""Semantic segmentation: a class for each pixel; measured by mean intersection over union and by accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_qat.cli.tasks.classes import Classes


#: What marks pixels that belong to no class, in transformers as in most data sets.
IGNORED = 255


def classes(processor: Any, dataset: Any, column: str) -> Classes:
    """Numbers for names: a picture of classes does not tell any.

    With a processor that reduces labels, 0 is no class in the pictures, and each other number is one more than the
    model's.
    """
    largest = 0
    for mask in dataset[column]:
        numbers = np.asarray(mask)
        largest = max(largest, int(numbers[numbers != IGNORED].max(initial=0)))
    reduced = bool(getattr(processor, "do_reduce_labels", False))
    return Classes.numbered(max(largest + 1 - reduced, 1))


def encode(processor: Any, images: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """Pixels and masks, resized alike."""
    if not labels:
        return dict(processor(images, return_tensors="pt"))
    return dict(processor(images, segmentation_maps=list(labels), return_tensors="pt"))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """(N, 3, H, W) pixels and (N, H, W) labels."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def metrics(processor: Any, prediction: Any) -> dict[str, float]:
    """Mean intersection over union of the classes that occur, and the share of pixels that are right.

    The processor is not needed.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    logits, labels = torch.as_tensor(logits), torch.as_tensor(prediction.label_ids)
    resized = torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    counted = labels != IGNORED
    found, wanted = resized.argmax(1)[counted], labels[counted]
    classes = logits.shape[1]
    confusion = torch.bincount(wanted * classes + found, minlength=classes**2).view(classes, classes).double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    occurs = confusion.sum(1) > 0
    return {
        "mean_iou": float((confusion.diag()[occurs] / union[occurs]).mean()),
        "pixel_accuracy": float(confusion.diag().sum() / confusion.sum()),
    }
