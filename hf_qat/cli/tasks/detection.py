"""Object detection: boxes and classes for each image, in COCO's form; measured by COCO's mean average precision.

Source of the measure: Lin et al., "Microsoft COCO: Common Objects in Context", 2014, as `pycocotools` computes it.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from hf_qat.cli.tasks.classes import Classes, classes_of
from hf_qat.errors import ConfigError


logger = logging.get_logger(__name__)


#: What an object has; each is a list with one entry for each object of an image.
FIELDS = ("bbox", "category")

#: Pixels that a box may reach over the edge of its image without a word: as much as rounding makes.
OVER_THE_EDGE = 1.0


def classes(processor: Any, dataset: Any, column: str) -> Classes:
    """Those that the categories name or number; the processor is not needed.

    Raises:
        ConfigError: objects that are none, with the number of their row; or boxes that cannot be in pixels.
    """
    feature: Any = dataset.features[column]
    feature = getattr(feature, "feature", feature)
    if not isinstance(feature, Mapping) or not set(FIELDS) <= set(feature):
        has = ", ".join(feature) if isinstance(feature, Mapping) else type(feature).__name__
        raise ConfigError(
            f"{column!r} is to hold objects with {' and '.join(FIELDS)}, and has {has or 'none'}: "
            '{"bbox": [[x, y, width, height], …], "category": [number, …]} of each image.'
        )
    objects = [objects_of(label) for label in dataset[column]]
    for row, each in enumerate(objects):
        _check(row, each)
    if any(each["bbox"] for each in objects) and all(max(box) <= 1 for each in objects for box in each["bbox"]):
        raise ConfigError(f"no number in the boxes of {column!r} is above 1: give them in pixels, not in shares.")
    category: Any = feature["category"]
    category = getattr(category, "feature", category)
    return classes_of(category, (number for each in objects for number in each["category"]))


def objects_of(label: Any) -> dict[str, list[Any]]:
    """The objects of an image by `FIELDS`, of both forms that data sets have, and of an image with none.

    Args:
        label: a mapping of lists, a list of mappings, or `None`.
    """
    if label is None or isinstance(label, Mapping):
        return {name: list((label or {}).get(name) or []) for name in FIELDS}
    return {name: [one.get(name) for one in label] for name in FIELDS}


def _check(row: int, objects: Mapping[str, list[Any]]) -> None:
    boxes, categories = (objects[name] for name in FIELDS)
    if len(boxes) != len(categories):
        raise ConfigError(f"image {row + 1} has {len(boxes)} boxes and {len(categories)} categories.")
    for box in boxes:
        numbers = [value for value in box or [] if isinstance(value, (int, float)) and math.isfinite(value)]
        if not isinstance(box, list) or len(numbers) != 4 or len(box) != 4 or min(numbers[2:]) < 0:
            raise ConfigError(f"image {row + 1} has a box {box!r}: each is to be [x, y, width, height], in pixels.")


def renumbered(label: Any, number_of: Callable[[object], int]) -> dict[str, Any]:
    """The objects of an image, with the model's numbers of their categories."""
    objects = objects_of(label)
    return {**objects, "category": [number_of(category) for category in objects["category"]]}


def warn_of_boxes_outside(image: Image.Image, label: Any) -> None:
    """Log once that boxes reach out of an image: perhaps corners were given in the place of sizes.

    A processor cuts off what lies outside, and leaves out boxes of which nothing is left, without a word.
    """
    right, bottom = (edge + OVER_THE_EDGE for edge in image.size)
    for x, y, width, height in objects_of(label)["bbox"]:
        if min(x, y) < -OVER_THE_EDGE or x + width > right or y + height > bottom:
            logger.warning_once(
                "Boxes reach out of their images. They are to be [x, y, width, height] in pixels, not two corners; "
                "what lies outside is cut off."
            )


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


def require_pycocotools() -> None:
    """Raise `ConfigError` if what measures detection is not installed."""
    if find_spec("pycocotools") is None:
        raise ConfigError(
            'detection is measured by pycocotools, which is not installed: pip install "hf_qat[detection]".'
        )


def scores_and_boxes(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """What is measured among a detector's outputs, so that Trainer keeps no more of an evaluation set.

    Args:
        outputs: as Trainer has them: the values of the model's output without its loss. Of every detector of
            transformers, `logits` (N, queries, classes) and `pred_boxes` (N, queries, 4) are the first tensors.
        labels: not read.
    """
    logits, boxes = [value for value in outputs if isinstance(value, Tensor)][:2]
    return logits, boxes


def metrics(processor: Any, prediction: Any) -> dict[str, float]:
    """Mean average precision over overlaps of 0.5, 0.55, …, 0.95 (`map`) and at 0.5 (`map_50`); from 0 to 1.

    Args:
        processor: turns scores and boxes into detections, as its model means them.
        prediction: lists of batches: `scores_and_boxes`, and labels as `encode` gives them.
    """
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    image = 0
    for (logits, boxes), labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        outputs = SimpleNamespace(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes))
        sizes = torch.stack([torch.as_tensor(label["orig_size"]) for label in labels])
        detections = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        for detected, label, (height, width) in zip(detections, labels, sizes.tolist(), strict=True):
            image += 1
            found += [{"image_id": image, **one} for one in _as_coco(detected)]
            truth += [{"image_id": image, **one} for one in _labelled(label, height, width)]
    return mean_average_precision(truth, found, image)


def _as_coco(detected: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Detections of one image, whose boxes are corners: x, y, x, y."""
    corners = detected["boxes"].double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    classes, scores = detected["labels"].tolist(), detected["scores"].tolist()
    return [
        {"category_id": number, "bbox": box, "score": score}
        for number, box, score in zip(classes, boxes, scores, strict=True)
    ]


def _labelled(label: dict[str, Any], height: float, width: float) -> list[dict[str, Any]]:
    """Objects of one image, whose boxes are centre, width and height in shares of the image."""
    size = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = torch.as_tensor(label["boxes"]).double() * size
    boxes[:, :2] -= boxes[:, 2:] / 2
    classes = torch.as_tensor(label["class_labels"]).tolist()
    return [
        {"category_id": number, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, box in zip(classes, boxes.tolist(), strict=True)
    ]


def mean_average_precision(
    truth: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], images: int
) -> dict[str, float]:
    """`map` and `map_50` of detections in COCO's form, by `pycocotools`.

    Args:
        truth: objects: `image_id`, `category_id`, `bbox` (x, y, width, height), `area`, `iscrowd`.
        found: detections: `image_id`, `category_id`, `bbox`, `score`.
        images: their number; they are counted from 1.

    Raises:
        ConfigError: `pycocotools` is not installed, or there is no object.
    """
    require_pycocotools()
    if not truth:
        raise ConfigError("no image of the evaluation set has an object: there is nothing to measure by.")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:
        return {"map": 0.0, "map_50": 0.0}
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": number} for number in sorted({one["category_id"] for one in [*truth, *found]})],
        "annotations": [{"id": number, **one} for number, one in enumerate(truth, 1)],  # 0 means "not matched" there
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([*found]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": float(evaluation.stats[0]), "map_50": float(evaluation.stats[1])}
