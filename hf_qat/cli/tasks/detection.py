"""Object detection: boxes and classes for each image, in COCO's form; measured by the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def class_names(dataset: Any, column: str) -> list[str]:
    """Names of the categories, in the order of their numbers."""
    feature: Any = dataset.features[column]
    feature = getattr(feature, "feature", feature)
    category: Any = feature["category"] if isinstance(feature, dict) else feature
    category = getattr(category, "feature", category)
    if hasattr(category, "names"):
        return list(category.names)
    largest = max((number for objects in dataset[column] for number in objects["category"]), default=0)
    return [str(number) for number in range(largest + 1)]


def encode(processor: Any, images: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """Pixels, and for each image what DETR's losses take.

    Args:
        processor: of a detection model.
        images: of any size.
        labels: for each image `{"bbox": [[x, y, width, height], …], "category": [number, …]}`, in pixels.
    """
    if not labels:
        return dict(processor(images, return_tensors="pt"))
    annotations = [
        {
            "image_id": k,
            "annotations": [
                {"image_id": k, "bbox": box, "category_id": category, "area": box[2] * box[3], "iscrowd": 0}
                for box, category in zip(objects["bbox"], objects["category"], strict=True)
            ],
        }
        for k, objects in enumerate(labels)
    ]
    return dict(processor(images, annotations=annotations, return_tensors="pt"))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pixels (and masks) in a batch, labels in a list."""
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
    if "labels" in rows[0]:
        batch["labels"] = [dict(row["labels"]) for row in rows]
    return batch
