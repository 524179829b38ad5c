"""Tiny models that give something for every pixel: key points, mattes, super-resolution, normals, segments, text."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.coverage.backbones import DETECTION_VIT
from tests.coverage.case import LABELS, Case
from tests.coverage.classification import DINO, SWIN, VIT, config
from tests.coverage.segmentation import tipsv2_config


HIERA_SAM2 = {
    "hidden_size": 8,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "num_query_pool_stages": 3,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 4],
    "window_size_per_stage": [8, 4, 4, 4],
    "window_positional_embedding_background_size": [4, 4],
    "global_attention_blocks": [3],
    "mlp_ratio": 2.0,
}

SAM_VISION = {
    "hidden_size": 16,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
    "num_pos_feats": 8,
    "mlp_dim": 32,
}

SAM_DECODER = {
    "hidden_size": 16,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_depth": 2,
    "iou_head_hidden_dim": 16,
}

SAPIENS2 = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_register_tokens": 2,
    "num_key_value_heads_per_layer": [2, 1],
    "num_key_value_attention_heads": 1,
    "head_config": {"upsample_out_channels": [8, 8], "conv_out_channels": [8]},
}


def _sam(family: str) -> Any:
    return lambda: getattr(transformers, f"{family}Config")(
        vision_config=SAM_VISION,
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config=SAM_DECODER,
    )


def _points(pixels: Tensor) -> dict[str, Any]:
    """One point in the picture."""
    points = torch.tensor([[[20.0, 30.0]]]).repeat(len(pixels), 1, 1, 1)
    labels = torch.ones(len(pixels), 1, 1, dtype=torch.long)
    return {"pixel_values": pixels, "input_points": points, "input_labels": labels}


def _four_channels(pixels: Tensor) -> dict[str, Any]:
    """An image with its trimap."""
    return {"pixel_values": torch.cat([pixels, pixels[:, :1]], 1)}


def _sam2_vision() -> Any:
    return transformers.Sam2VisionConfig(
        backbone_config=transformers.Sam2HieraDetConfig(**HIERA_SAM2),
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )


def _vitmatte() -> Any:
    sizes = DETECTION_VIT | {"image_size": 64, "pretrain_image_size": 64, "patch_size": 16}
    backbone = transformers.VitDetConfig(**sizes, num_channels=4, out_features=["stage2"])
    return transformers.VitMatteConfig(
        backbone_config=backbone, hidden_size=16, convstream_hidden_sizes=[8, 8, 8], fusion_hidden_sizes=[16, 8, 8, 8]
    )


def _vitpose(**options: Any) -> Any:
    def make() -> Any:
        backbone = transformers.VitPoseBackboneConfig(
            **{**DINO, "image_size": (32, 32), "patch_size": (8, 8)}, out_features=["stage2"]
        )
        return transformers.VitPoseConfig(backbone_config=backbone, num_labels=LABELS, **options)

    return make


def _case(task: str, cls: str, make: Any, size: int = 32, **options: Any) -> Case:
    return Case(task, cls, make, size, heavy=True, **options)


DENSE = [
    _case("Key points", "VitPoseForPoseEstimation", _vitpose()),
    _case(
        "Key points",
        "SuperPointForKeypointDetection",
        config("SuperPoint", encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, descriptor_decoder_dim=16),
        images=1,
    ),
    _case("Key points", "Sapiens2ForPoseEstimation", config("Sapiens2", **SAPIENS2, num_labels=LABELS)),
    _case("Dense prediction", "Sapiens2ForNormalEstimation", config("Sapiens2", **SAPIENS2)),
    _case("Dense prediction", "Tipsv2DptForNormalEstimation", tipsv2_config),
    _case("Matting", "VitMatteForImageMatting", _vitmatte, 64, inputs=_four_channels),
    _case(
        "Super-resolution",
        "Swin2SRForImageSuperResolution",
        config("Swin2SR", **{**SWIN, "patch_size": 1, "depths": [1, 1], "window_size": 8}),
    ),
    _case(
        "Super-resolution",
        "Swin2SRModel",
        config("Swin2SR", **{**SWIN, "patch_size": 1, "depths": [1, 1], "window_size": 8}),
    ),
    _case("Segment anything", "SamVisionModel", config("SamVision", **SAM_VISION), 64),
    _case("Segment anything", "SamModel", _sam("Sam"), 64, inputs=_points),
    _case("Segment anything", "SamHQVisionModel", config("SamHQVision", **SAM_VISION), 64),
    _case("Segment anything", "Sam2HieraDetModel", config("Sam2HieraDet", **HIERA_SAM2), 64),
    _case("Segment anything", "Sam2VisionModel", _sam2_vision, 64),
    _case(
        "Segment anything",
        "Sam3ViTModel",
        config("Sam3ViT", **{**VIT, "image_size": 32}, window_size=2, global_attn_indexes=[1], pretrain_image_size=32),
    ),
    _case(
        "Masked image modelling",
        "ViTMAEForPreTraining",
        config(
            "ViTMAE",
            **VIT,
            decoder_num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=32,
        ),
        not_exported="it draws what it hides",
    ),
]
