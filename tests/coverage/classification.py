"""Tiny models of `MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING`, each class at least once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.coverage.case import LABELS, Case, classes


#: A plain vision transformer of two layers on 4 x 4 patches.
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}

#: The same for configs that give the width of the MLP as a ratio.
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}

#: Two stages of shifted windows.
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
}

#: Four stages of a pyramid.
PYRAMID = {
    "hidden_sizes": [4, 8, 8, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
}

PERCEIVER = {
    "num_latents": 4,
    "d_latents": 16,
    "d_model": 16,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "image_size": 32,
}

HGNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16],
    "stage_mid_channels": [8, 8],
    "stage_out_channels": [16, 32],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_downsample_strides": [2, 2],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 5],
    "stage_numb_of_layers": [2, 2],
}

BEIT = VIT | {"drop_path_rate": 0.0, "use_relative_position_bias": True}

LCNET_BLOCKS = [
    [[3, 8, 8, 1, False]],
    [[3, 8, 16, 2, False]],
    [[3, 16, 16, 1, False]],
    [[5, 16, 16, 1, False]],
    [[5, 16, 16, 2, True]],
]

#: Classes without a loss.
UNLABELLED = {
    "DeiTForImageClassificationWithTeacher",
    "LevitForImageClassificationWithTeacher",
    "PPLCNetForImageClassification",
}

TEXTNET = {
    "stem_out_channels": 8,
    "hidden_sizes": [8, 8, 16, 16, 16],
    "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3], [3, 1]]],
    "conv_layer_strides": [[1], [2, 1], [2], [2, 1]],
    "image_size": [64, 64],
}


#: Slow to export, or the same code as another class of the table.
HEAVY = {
    "Data2VecVisionForImageClassification",
    "DeiTForImageClassification",
    "DonutSwinForImageClassification",
    "IJepaForImageClassification",
    "LevitForImageClassificationWithTeacher",
    "MobileViTForImageClassification",
    "PerceiverForImageClassificationFourier",
    "PerceiverForImageClassificationLearned",
    "ViTMSNForImageClassification",
}


def config(name: str, **options: Any) -> Callable[[], Any]:
    """Makes a config of the class `name`."""
    return lambda: getattr(transformers, f"{name}Config")(**options)


def _case(cls: str, config_name: str, size: int = 32, name: str = "", **options: Any) -> Case:
    make = config(config_name, num_labels=LABELS, **options)
    return Case(
        "Image classification", cls, make, size, None if cls in UNLABELLED else classes, name, heavy=cls in HEAVY
    )


def _image(family: str, name: str = "", size: int = 32, **options: Any) -> Case:
    return _case(f"{family}ForImageClassification", family, size, name, **options)


def _vision_tower(family: str, **options: Any) -> Case:
    """A classifier on the vision half of an image-text model."""

    def make() -> Any:
        return getattr(transformers, f"{family}Config")(vision_config={**VIT, **options}, num_labels=LABELS)

    return Case(
        "Image classification", f"{family}ForImageClassification", make, 32, classes, heavy=family == "MetaClip2"
    )


def _patch_sequence(pixels: Tensor) -> dict[str, Any]:
    """(N, 3, 32, 32) → (N, 16, 192) patches with their mask and grid, as SigLIP 2 takes them."""
    batch = len(pixels)
    patches = pixels.view(batch, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(batch, 16, 192)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.long),
        "spatial_shapes": torch.full((batch, 2), 4),
    }


CLASSIFICATION = [
    _image("Beit", **BEIT),
    _image("Beit", "shared bias", **VIT, drop_path_rate=0.0, use_shared_relative_position_bias=True),
    _image("Bit", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4),
    _vision_tower("CLIP"),
    _image("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    _image("ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    _image(
        "Cvt",
        embed_dim=[8, 16, 16],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        mlp_ratio=[2.0] * 3,
        drop_path_rate=[0.0] * 3,
    ),
    _image("Data2VecVision", **BEIT),
    _image("DeiT", **VIT),
    _case("DeiTForImageClassificationWithTeacher", "DeiT", **VIT),
    _image("Dinov2", **DINO),
    _image("Dinov2", "SwiGLU", **DINO, use_swiglu_ffn=True),
    _image("Dinov2WithRegisters", **DINO),
    _image("DonutSwin", **SWIN),
    _image(
        "EfficientNet",
        width_coefficient=0.25,
        depth_coefficient=0.3,
        image_size=32,
        hidden_dim=320,
        in_channels=[32, 16, 24, 40],
        out_channels=[16, 24, 40, 64],
        kernel_sizes=[3, 3, 5, 3],
        strides=[1, 2, 2, 1],
        num_block_repeats=[1, 2, 1, 1],
        expand_ratios=[1, 6, 6, 6],
        drop_connect_rate=0.0,
    ),
    _image(
        "FocalNet",
        image_size=32,
        embed_dim=8,
        hidden_sizes=[16, 16],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        drop_path_rate=0.0,
    ),
    _image("HGNetV2", **HGNET),
    _image("HGNetV2", "learnable affine", **HGNET, use_learnable_affine_block=True),
    _image(
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
    _image("IJepa", **VIT),
    _case(
        "LevitForImageClassification",
        "Levit",
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    _case(
        "LevitForImageClassificationWithTeacher",
        "Levit",
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    _vision_tower("MetaClip2"),
    _image("MobileNetV1", depth_multiplier=0.125, min_depth=4, image_size=32),
    _image("MobileNetV2", depth_multiplier=0.1, min_depth=4, image_size=32),
    _image(
        "MobileViT",
        image_size=32,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
        num_attention_heads=2,
    ),
    _image(
        "MobileViTV2",
        size=64,
        image_size=64,
        width_multiplier=0.125,
        base_attn_unit_dims=[128, 128, 128],
        n_attn_blocks=[1, 1, 1],
    ),
    _case("PerceiverForImageClassificationLearned", "Perceiver", **PERCEIVER),
    _case("PerceiverForImageClassificationFourier", "Perceiver", **PERCEIVER),
    _case("PerceiverForImageClassificationConvProcessing", "Perceiver", **PERCEIVER),
    _image("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], mlp_ratio=2.0),
    _image("PPLCNet", scale=1.0, block_configs=LCNET_BLOCKS, stem_channels=8, class_expand=32),
    _image("Pvt", **PYRAMID, image_size=32, sequence_reduction_ratios=[4, 2, 1, 1]),
    _image("PvtV2", **PYRAMID, image_size=[32, 32], sr_ratios=[4, 2, 1, 1]),
    _image("PvtV2", "linear attention", **PYRAMID, image_size=[32, 32], linear_attention=True),
    _image("RegNet", "X", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="x"),
    _image("RegNet", "Y", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="y"),
    _image("ResNet", "basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    _image("ResNet", "bottleneck", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck"),
    _image("Segformer", **PYRAMID, drop_path_rate=0.0),
    _vision_tower("Siglip"),
    Case(
        "Image classification",
        "Siglip2ForImageClassification",
        lambda: transformers.Siglip2Config(vision_config={**VIT, "num_patches": 16}, num_labels=LABELS),
        32,
        classes,
        inputs=_patch_sequence,
    ),
    _image("SwiftFormer", size=64, image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratio=2),
    _image("Swin", **SWIN),
    _image("Swinv2", **SWIN),
    _image("TextNet", size=64, **TEXTNET),
    _image("ViT", **VIT),
    _image("ViTMSN", **VIT),
]
