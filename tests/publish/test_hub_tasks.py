"""What the Hub calls the task of a model, against its own names and transformers' classes."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from hf_qat.publish.hub_tasks import loader_of, task_of


@pytest.mark.parametrize(
    ("name", "task", "loader"),
    [
        ("ResNetForImageClassification", "image-classification", "AutoModelForImageClassification"),
        ("LevitForImageClassificationWithTeacher", "image-classification", "LevitForImageClassificationWithTeacher"),
        ("Mask2FormerForUniversalSegmentation", "image-segmentation", "Mask2FormerForUniversalSegmentation"),
        ("Swin2SRForImageSuperResolution", "image-to-image", "Swin2SRForImageSuperResolution"),
        ("VideoMAEForVideoClassification", "video-classification", "VideoMAEForVideoClassification"),
        ("SamModel", "mask-generation", "SamModel"),
        ("SamVisionModel", "image-feature-extraction", "SamVisionModel"),
        ("VitMatteForImageMatting", "image-segmentation", "VitMatteForImageMatting"),
        ("SuperPointForKeypointDetection", "keypoint-detection", "SuperPointForKeypointDetection"),
        ("SuperGlueForKeypointMatching", "keypoint-detection", "SuperGlueForKeypointMatching"),
        ("OwlViTForObjectDetection", "zero-shot-object-detection", "OwlViTForObjectDetection"),
        ("YolosForObjectDetection", "object-detection", "AutoModelForObjectDetection"),
        ("CLIPModel", "zero-shot-image-classification", "CLIPModel"),
        ("ViTModel", "image-feature-extraction", "ViTModel"),
        ("OfSomebody", "image-feature-extraction", "AutoModel"),
    ],
)
def test_a_model_is_loaded_by_a_class_that_has_all_its_layers(name: str, task: str, loader: str):
    model = type(name, (nn.Module,), {})()
    assert (task_of(model).tag, loader_of(model)) == (task, loader)
    assert hasattr(transformers, loader)


def test_a_pipeline_is_named_only_for_models_that_it_takes():
    """A matte is made from a trimap, too, so that the pipeline of segmentation cannot make it."""
    takes = {
        name: task_of(type(name, (nn.Module,), {})()).pipeline
        for name in (
            "SegformerForSemanticSegmentation",
            "VitMatteForImageMatting",
            "OwlViTForObjectDetection",
            "SamModel",
        )
    }
    assert takes == {
        "SegformerForSemanticSegmentation": True,
        "VitMatteForImageMatting": False,
        "OwlViTForObjectDetection": False,
        "SamModel": False,
    }
