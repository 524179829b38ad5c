"""What a model does, in the words of the Hub, and how a user of the Hub loads it.

The Hub's tasks: https://github.com/huggingface/huggingface.js, packages/tasks/src/pipelines.ts. Matching of key points
is one of detecting them there.
"""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from torch import nn
from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class HubTask:
    """What a model does.

    Attributes:
        tag: the Hub's name of it.
        auto_class: loads such models; `None` where not every version of transformers has one.
        pipeline: whether transformers' `pipeline` of that name takes them, and a photo alone.
    """

    tag: str
    auto_class: str | None = None
    pipeline: bool = False


#: transformers' own lists of classes whose names do not tell what they do, or tell something else.
LISTED = {
    "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES": HubTask("mask-generation"),
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES": HubTask("zero-shot-object-detection"),
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES": HubTask("zero-shot-image-classification"),
}

#: What the name of a Hugging Face class ends in → what it does.
ENDINGS = {
    "ForImageClassification": HubTask("image-classification", "AutoModelForImageClassification", pipeline=True),
    "ForImageClassificationWithTeacher": HubTask("image-classification", pipeline=True),
    "ForSemanticSegmentation": HubTask("image-segmentation", "AutoModelForSemanticSegmentation", pipeline=True),
    "ForInstanceSegmentation": HubTask("image-segmentation", pipeline=True),
    "ForUniversalSegmentation": HubTask("image-segmentation", pipeline=True),
    "DetrForSegmentation": HubTask("image-segmentation", pipeline=True),
    "ForImageMatting": HubTask("image-segmentation"),
    "ForObjectDetection": HubTask("object-detection", "AutoModelForObjectDetection", pipeline=True),
    "ForDepthEstimation": HubTask("depth-estimation", "AutoModelForDepthEstimation", pipeline=True),
    "ForKeypointDetection": HubTask("keypoint-detection"),
    "ForKeypointMatching": HubTask("keypoint-detection"),
    "ForPoseEstimation": HubTask("keypoint-detection"),
    "ForImageSuperResolution": HubTask("image-to-image"),
    "ForVideoClassification": HubTask("video-classification"),
    "Backbone": HubTask("image-feature-extraction", "AutoBackbone"),
}
OTHER = HubTask("image-feature-extraction")


def task_of(model: nn.Module) -> HubTask:
    """What a model does, by the name of its class."""
    name = type(model).__name__
    for table, task in LISTED.items():
        if name in getattr(modeling_auto, table, {}).values():
            return task
    return next((task for ending, task in ENDINGS.items() if name.endswith(ending)), OTHER)


def loader_of(model: nn.Module) -> str:
    """The class that loads a model with all its layers: its own, where no auto class is sure to."""
    name = type(model).__name__
    return task_of(model).auto_class or (name if hasattr(transformers, name) else "AutoModel")
