"""Tiny vision towers: the halves of models of images and text that see."""

from __future__ import annotations

from tests.coverage.base_models import tower
from tests.coverage.case import Case
from tests.coverage.classification import VIT, _patch_sequence, config


RATIO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}

TOWERS = [
    tower("Aimv2VisionModel", "Aimv2Vision", **VIT),
    tower("AltCLIPVisionModel", "AltCLIPVision", **VIT),
    tower("BlipVisionModel", "BlipVision", **VIT),
    tower("Blip2VisionModel", "Blip2Vision", **VIT),
    tower("CLIPVisionModel", "CLIPVision", **VIT),
    tower("CLIPVisionModelWithProjection", "CLIPVision", **VIT, projection_dim=8),
    tower("CLIPSegVisionModel", "CLIPSegVision", **VIT),
    tower("ChineseCLIPVisionModel", "ChineseCLIPVision", **VIT),
    tower("FlavaImageModel", "FlavaImage", **VIT),
    tower("GitVisionModel", "GitVision", **VIT),
    tower(
        "GroupViTVisionModel",
        "GroupViTVision",
        **{**VIT, "num_hidden_layers": 3},
        depths=[1, 1, 1],
        num_group_tokens=[4, 2, 0],
        num_output_groups=[4, 2, 2],
    ),
    tower("InstructBlipVisionModel", "InstructBlipVision", **VIT),
    tower("InstructBlipVideoVisionModel", "InstructBlipVideoVision", **VIT),
    tower("InternVLVisionModel", "InternVLVision", **{**VIT, "image_size": [32, 32], "patch_size": [8, 8]}),
    tower("JanusVisionModel", "JanusVision", **RATIO),
    tower("MLCDVisionModel", "MLCDVision", **VIT),
    tower("MetaClip2VisionModel", "MetaClip2Vision", **VIT),
    tower("MetaClip2VisionModelWithProjection", "MetaClip2Vision", **VIT, projection_dim=8),
    tower("OwlViTVisionModel", "OwlViTVision", **VIT),
    tower("Owlv2VisionModel", "Owlv2Vision", **VIT),
    tower("SiglipVisionModel", "SiglipVision", **VIT),
    Case(
        "Vision towers",
        "Siglip2VisionModel",
        config("Siglip2Vision", **{k: v for k, v in VIT.items() if k != "image_size"}, num_patches=16),
        inputs=_patch_sequence,
        heavy=True,
    ),
    Case("Vision towers", "ViTMAEModel", config("ViTMAE", **VIT), heavy=True, not_exported="it draws what it hides"),
]
