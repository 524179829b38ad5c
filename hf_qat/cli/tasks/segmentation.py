"""Semantic segmentation: a class for each pixel; measured by mean intersection over union and by accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_qat.cli import pictures
from hf_qat.cli.tasks.classes import Classes
from hf_qat.errors import ConfigError


#: What marks pixels that belong to no class, in transformers as in most data sets.
IGNORED = 255


def classes(processor: Any, dataset: Any, column: str) -> Classes:
    """Numbers for names: a picture of classes does not tell any.

    With a processor that reduces labels, 0 is no class in the pictures, and each other number is one more than the
    model's.
    """
    largest = 0
    for value in dataset[column]:
        mask = pictures.read(value)
        with pictures.naming(value):
            largest = max(largest, _largest(mask))
    reduced = bool(getattr(processor, "do_reduce_labels", False))
    return Classes.numbered(max(largest + 1 - reduced, 1))


def _largest(mask: Image.Image) -> int:
    """Of the numbers in a mask."""
    numbers = np.asarray(mask)
    wrong = f"{numbers.shape[-1]} channels" if numbers.ndim != 2 else ""
    wrong = wrong or ("floating-point numbers" if numbers.dtype.kind == "f" else "")
    if wrong:
        raise ConfigError(f"a mask has {wrong}: give PNGs of 8 or 16 bits whose pixels are the numbers of classes.")
    return int(numbers[numbers != IGNORED].max(initial=0))


def encode(processor: Any, images: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """Pixels and masks, resized alike."""
    if not labels:
        return dict(processor(images, return_tensors="pt"))
    return dict(processor(images, segmentation_maps=list(labels), return_tensors="pt"))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """(N, 3, H, W) pixels and (N, H, W) labels."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def classes_of_pixels(outputs: Any, labels: Tensor) -> Tensor:
    """(N, H, W) int16, the best class of each pixel: of many images, all scores would not fit into memory.

    Args:
        outputs: as Trainer has them: logits (N, classes, h, w), alone or before other outputs.
        labels: (N, H, W).
    """
    logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    resized = torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return resized.argmax(1).to(torch.int16)


def metrics(processor: Any, prediction: Any) -> dict[str, float]:
    """Mean intersection over union of the classes that occur, and the share of pixels that are right.

    Args:
        processor: not needed.
        prediction: `classes_of_pixels`, and masks of the same size.

    Raises:
        ConfigError: no pixel has a class.
    """
    wanted, found = torch.as_tensor(prediction.label_ids), torch.as_tensor(prediction.predictions)
    counted = (wanted != IGNORED) & (wanted >= 0)  # Trainer fills up with -100 where sizes differ
    if not counted.any():
        raise ConfigError("no pixel of the masks has a class: there is nothing to measure by.")
    classes = 1 + max(int(values[counted].max()) for values in (wanted, found))
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    for truth, said, known in zip(wanted, found, counted, strict=True):
        pairs = truth[known].long() * classes + said[known].long()
        confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    occurs = confusion.sum(1) > 0
    return {
        "mean_iou": float((confusion.diag()[occurs] / union[occurs]).mean()),
        "pixel_accuracy": float(confusion.diag().sum() / confusion.sum()),
    }
