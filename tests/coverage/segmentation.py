"""Tiny models of `MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING`, each class at least once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.coverage.case import LABELS, Case, masks
from tests.coverage.classification import PYRAMID, SWIN, VIT


VIT4 = VIT | {"num_hidden_layers": 4}

BEIT4 = VIT4 | {"drop_path_rate": 0.0, "use_relative_position_bias": True, "auxiliary_channels": 8}

DPT = {
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [4, 8, 8, 16],
    "fusion_hidden_size": 8,
    "is_hybrid": False,
}

RESNET4 = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
CONVNEXT4 = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64}
SWIN4 = SWIN | {"image_size": 64, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _case(family: str, size: int = 32, name: str = "", **options: Any) -> Case:
    def make() -> Any:
        return getattr(transformers, f"{family}Config")(num_labels=LABELS, **options)

    return Case(
        "Semantic segmentation",
        f"{family}ForSemanticSegmentation",
        make,
        size,
        masks,
        name,
        heavy=family == "MobileViTV2",
    )


def _upernet(name: str, backbone: Callable[[], Any], in_channels: int) -> Case:
    def make() -> Any:
        return transformers.UperNetConfig(
            backbone_config=backbone(),
            hidden_size=8,
            auxiliary_channels=8,
            auxiliary_in_channels=in_channels,
            num_labels=LABELS,
        )

    return Case("Semantic segmentation", "UperNetForSemanticSegmentation", make, 64, masks, name)


def tipsv2_config() -> Any:
    """A DPT head on a vision transformer of four layers."""
    backbone = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 32,
        "patch_size": 8,
        "out_features": STAGES,
        "reshape_hidden_states": False,
        "model_type": "tipsv2_vision_model",
    }
    return transformers.Tipsv2DptConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[4, 8, 8, 16],
        fusion_hidden_size=8,
        num_depth_bins=8,
        num_labels=LABELS,
    )


SEGMENTATION = [
    _case("Beit", **BEIT4, out_indices=[1, 2, 3, 4]),
    _case("Data2VecVision", **BEIT4, out_indices=[0, 1, 2, 3]),
    _case("DPT", **VIT4, **DPT),
    _case("MobileNetV2", depth_multiplier=0.1, min_depth=4, image_size=32, output_stride=8),
    _case(
        "MobileViT",
        image_size=32,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
        num_attention_heads=2,
        aspp_out_channels=8,
        output_stride=16,
        atrous_rates=[1, 2, 3],
    ),
    _case(
        "MobileViTV2",
        64,
        image_size=64,
        width_multiplier=0.125,
        base_attn_unit_dims=[128, 128, 128],
        n_attn_blocks=[1, 1, 1],
        aspp_out_channels=8,
        atrous_rates=[1, 2, 3],
    ),
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
        head_config={"upsample_out_channels": [8, 8], "conv_out_channels": [8]},
    ),
    _case("Segformer", 64, **PYRAMID, decoder_hidden_size=8, drop_path_rate=0.0),
    Case("Semantic segmentation", "Tipsv2DptForSemanticSegmentation", tipsv2_config, 32, masks),
    _upernet("ResNet", lambda: transformers.ResNetConfig(**RESNET4, out_features=STAGES), 16),
    _upernet("Swin", lambda: transformers.SwinConfig(**SWIN4, out_features=STAGES), 32),
    _upernet("ConvNeXt", lambda: transformers.ConvNextConfig(**CONVNEXT4, out_features=STAGES), 16),
]
