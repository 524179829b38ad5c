"""Tiny backbones, alone: every class of `MODEL_FOR_BACKBONE_MAPPING` that a config can build."""

from __future__ import annotations

from typing import Any

from tests.coverage.case import Case
from tests.coverage.classification import BEIT, DINO, HGNET, LCNET_BLOCKS, PYRAMID, SWIN, TEXTNET, VIT, config


#: Four blocks of the vision transformers that detectors use, with global attention only.
DETECTION_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 32,
    "pretrain_image_size": 32,
    "patch_size": 8,
}

DINOV3 = {key: value for key, value in VIT.items()} | {"num_register_tokens": 2}

LCNET = {"scale": 1.0, "block_configs": LCNET_BLOCKS, "stem_channels": 8}


UVDOC = config(
    "UVDocBackbone",
    resnet_head=[[3, 8], [8, 8]],
    resnet_configs=[[[8, 8, 1, False]], [[8, 8, 1, True]], [[8, 8, 1, True]]],
    stage_configs=[[[8, 1]], [[8, 2]], [[8, 3]]],
)

LCNET_V4 = config(
    "PPLCNetV4",
    block_configs=[
        [[3, 8, 8, 1, True]],
        [[3, 8, 8, 1, False]],
        [[3, 8, 16, [2, 1], False]],
        [[3, 16, 16, [2, 1], True]],
    ],
    stem_channels=[3, 8, 8],
)


def _case(family: str, size: int = 32, name: str = "", config_name: str = "", stages: int = 2, **options: Any) -> Case:
    cls = config_name or family
    make = config(cls, out_features=[f"stage{k + 1}" for k in range(stages)], **options)
    return Case("Backbone", f"{family}Backbone", make, size, None, name, heavy=True)


BACKBONES = [
    _case("Beit", **BEIT),
    _case("Bit", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4),
    _case("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    _case("ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    _case("Dinov2", **DINO),
    _case("Dinov2WithRegisters", **DINO),
    _case("DINOv3ConvNext", hidden_sizes=[8, 16], depths=[1, 1]),
    _case("DINOv3ViT", **DINOV3),
    _case(
        "FocalNet",
        image_size=32,
        embed_dim=8,
        hidden_sizes=[16, 16],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        drop_path_rate=0.0,
    ),
    _case("HGNetV2", **HGNET),
    _case(
        "Hiera",
        embed_dim=8,
        image_size=[32, 32],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        depths=[1, 1, 1],
        num_heads=[1, 2, 2],
        num_query_pool=2,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False],
    ),
    _case("LwDetrViT", **{**DETECTION_VIT, "image_size": 32, "num_windows": 4}),
    _case("MaskFormerSwin", **SWIN),
    _case("Pixio", **DINO, n_cls_tokens=2),
    _case("PPLCNet", **LCNET, class_expand=32),
    _case("PPLCNetV3", **LCNET),
    _case("PvtV2", **PYRAMID, image_size=[32, 32]),
    _case("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    _case("RfDetrDinov2", **DINO, num_windows=2),
    _case("RTDetrResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    _case(
        "Sapiens2",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=2,
        num_key_value_heads_per_layer=[2, 1],
        num_key_value_attention_heads=1,
    ),
    _case("Swin", **SWIN),
    _case("Swinv2", **SWIN),
    _case("TextNet", 64, **TEXTNET),
    _case("Tipsv2Vision", **DINO),
    _case("VitDet", **DETECTION_VIT),
    _case(
        "VitDet",
        name="windows, relative positions",
        **DETECTION_VIT,
        window_block_indices=[0],
        window_size=2,
        use_relative_position_embeddings=True,
    ),
    _case("VitPose", config_name="VitPoseBackbone", **{**DINO, "image_size": (32, 32), "patch_size": (8, 8)}),
    Case("Backbone", "UVDocBackbone", UVDOC, 64, heavy=True),
    Case("Backbone", "PPLCNetV4Backbone", LCNET_V4, 64, heavy=True),
]
