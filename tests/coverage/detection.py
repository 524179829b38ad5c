"""Tiny object detectors and universal segmenters, with Hugging Face's own matching losses."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.coverage.case import LABELS, Case, boxes
from tests.coverage.classification import HGNET, SWIN


def _resnet(*stages: str, depth: int = 2) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16][:depth],
        depths=[1] * depth,
        layer_type="basic",
        out_features=list(stages),
    )


#: A transformer of one encoder and one decoder layer with five queries.
DETR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": LABELS,
    "dropout": 0.0,
}

#: The real-time descendants: three feature levels, a hybrid encoder, queries selected from its output.
RT_DETR = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 16, 16],
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_queries": 5,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 32,
    "decoder_n_points": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 0,
    "hidden_expansion": 0.5,
    "num_labels": LABELS,
}

HGNET3 = HGNET | {
    "hidden_sizes": [8, 16, 16],
    "depths": [1, 1, 1],
    "stage_in_channels": [8, 8, 16],
    "stage_mid_channels": [8, 8, 8],
    "stage_out_channels": [8, 16, 16],
    "stage_num_blocks": [1, 1, 1],
    "stage_downsample": [True, True, True],
    "stage_downsample_strides": [2, 2, 2],
    "stage_light_block": [False, False, True],
    "stage_kernel_size": [3, 3, 5],
    "stage_numb_of_layers": [1, 1, 1],
}

STAGES3 = ["stage1", "stage2", "stage3"]


def _detr(family: str, **options: Any) -> Any:
    return getattr(transformers, f"{family}Config")(backbone_config=_resnet("stage2"), **{**DETR, **options})


def _dab_detr() -> Any:
    options = {key: value for key, value in DETR.items() if key != "d_model"}
    return transformers.DabDetrConfig(backbone_config=_resnet("stage2"), hidden_size=16, **options)


def _yolos() -> Any:
    return transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        num_labels=LABELS,
    )


def _rt_detr(family: str, **options: Any) -> Any:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic", out_features=STAGES3
    )
    return getattr(transformers, f"{family}Config")(backbone_config=backbone, **{**RT_DETR, **options})


def _d_fine(family: str, **options: Any) -> Any:
    backbone = transformers.HGNetV2Config(**HGNET3, out_features=STAGES3)
    return getattr(transformers, f"{family}Config")(backbone_config=backbone, **{**RT_DETR, **options})


def _detector(family: str, make: Any, size: int = 32, name: str = "") -> Case:
    return Case(
        "Object detection",
        f"{family}ForObjectDetection",
        make,
        size,
        boxes,
        name,
        heavy=family not in ("Detr", "DeformableDetr", "Yolos"),
    )


def segments(batch: int, size: int) -> dict[str, Any]:
    """Two masks an image, with a class each."""
    left = torch.zeros(2, size, size)
    left[0, :, : size // 2] = 1
    left[1, :, size // 2 :] = 1
    return {
        "mask_labels": [left.clone() for _ in range(batch)],
        "class_labels": [torch.tensor([k % LABELS, 1]) for k in range(batch)],
    }


def _swin() -> Any:
    return transformers.SwinConfig(
        **{**SWIN, "image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _maskformer() -> Any:
    decoder = transformers.DetrConfig(**{**DETR, "num_labels": LABELS}, backbone_config=_resnet("stage2"))
    return transformers.MaskFormerConfig(
        backbone_config=_swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=LABELS
    )


def _mask2former() -> Any:
    return transformers.Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=5,
        train_num_points=64,
        num_labels=LABELS,
    )


DETECTION = [
    _detector("Detr", lambda: _detr("Detr")),
    _detector("ConditionalDetr", lambda: _detr("ConditionalDetr")),
    _detector("DabDetr", _dab_detr),
    _detector(
        "DeformableDetr",
        lambda: _detr(
            "DeformableDetr",
            d_model=32,
            decoder_layers=2,
            num_feature_levels=2,
            decoder_n_points=2,
            encoder_n_points=2,
        ),
    ),
    _detector("TableTransformer", lambda: _detr("TableTransformer")),
    _detector("Yolos", _yolos),
    _detector("RTDetr", lambda: _rt_detr("RTDetr"), 64),
    _detector("RTDetrV2", lambda: _rt_detr("RTDetrV2"), 64),
    _detector("DFine", lambda: _d_fine("DFine"), 64),
]

UNIVERSAL = [
    Case("Universal segmentation", "MaskFormerForInstanceSegmentation", _maskformer, 64, segments, exported=False),
    Case("Universal segmentation", "Mask2FormerForUniversalSegmentation", _mask2former, 64, segments, exported=False),
]
