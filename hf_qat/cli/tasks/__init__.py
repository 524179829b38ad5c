"""What a task is, to the commands: how a row becomes a model's inputs and labels, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from hf_qat.cli import pictures
from hf_qat.cli.tasks import classification, depth, detection, segmentation
from hf_qat.cli.tasks.classes import Classes
from hf_qat.config.targets import did_you_mean
from hf_qat.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        auto_class: the name of transformers' class that loads its models.
        label_column: where data sets have what is to be learned.
        classes: (processor, data set, column) → its classes.
        encode: (processor, images, labels) → what a batch of rows becomes: inputs, and `labels` for the model.
        collate: rows as `encode` returns them → a batch.
        metrics: (processor, `EvalPrediction`) → what is measured.
        measured_outputs: (outputs of the model, labels) → those that `metrics` reads; `None` for all.
        joins_batches: whether `metrics` gets arrays of the whole evaluation set, or lists of batches.
        require: raises `ConfigError` where a library is missing that `metrics` calls.
        loss: Trainer's `compute_loss_func`, where models have no loss of their own.
        renumbered: (what is learned of an image, class → the model's number) → the same by the model's numbers;
            `None` where it is a picture.
        check: (image, what is to be learned of it) → nothing; raises `ConfigError` where the two cannot belong
            together.
        labels_are_images: whether a JSONL file names pictures under `label_column`.
    """

    auto_class: str
    label_column: str
    classes: Callable[[Any, Any, str], Classes]
    encode: Callable[[Any, Sequence[Any], Sequence[Any]], dict[str, Any]]
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    metrics: Callable[[Any, Any], dict[str, float]]
    measured_outputs: Callable[[Any, Any], Any] | None = None
    joins_batches: bool = True
    require: Callable[[], None] | None = None
    loss: Callable[..., Tensor] | None = None
    renumbered: Callable[[Any, Callable[[object], int]], Any] | None = None
    check: Callable[[Image.Image, Any], None] | None = None
    labels_are_images: bool = False


TASKS = {
    "image-classification": Task(
        "AutoModelForImageClassification",
        "label",
        classification.classes,
        classification.encode,
        classification.collate,
        classification.metrics,
        renumbered=classification.renumbered,
    ),
    "semantic-segmentation": Task(
        "AutoModelForSemanticSegmentation",
        "label",
        segmentation.classes,
        segmentation.encode,
        segmentation.collate,
        segmentation.metrics,
        segmentation.classes_of_pixels,
        check=pictures.require_same_shape,
        labels_are_images=True,
    ),
    "object-detection": Task(
        "AutoModelForObjectDetection",
        "objects",
        detection.classes,
        detection.encode,
        detection.collate,
        detection.metrics,
        detection.scores_and_boxes,
        joins_batches=False,
        require=detection.require_pycocotools,
        renumbered=detection.renumbered,
        check=detection.warn_of_boxes_outside,
    ),
    "depth-estimation": Task(
        "AutoModelForDepthEstimation",
        "depth",
        depth.classes,
        depth.encode,
        depth.collate,
        depth.metrics,
        loss=depth.loss,
        check=depth.check,
        labels_are_images=True,
    ),
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; with the nearest.
    """
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}.{did_you_mean(name, list(TASKS))} Known tasks: {', '.join(TASKS)}.")
    return TASKS[name]
