"""Tiny object detectors, with Hugging Face's own matching losses, in the configuration that they train in."""

from __future__ import annotations

from typing import Any

import transformers

from tests.coverage.case import LABELS, Case, boxes
from tests.coverage.classification import DINO, HGNET


def resnet(*stages: str, depth: int = 2) -> Any:
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
    "num_denoising": 10,
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

#: More queries in training than in evaluation.
GROUPED = {
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_n_points": 2,
    "num_queries": 5,
    "group_detr": 3,
    "c2f_num_blocks": 1,
    "num_labels": LABELS,
}

#: Four stages, of which document layout takes the first one for its masks.
HGNET4 = HGNET | {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1] * 4,
    "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": [8, 8, 16, 16],
    "stage_num_blocks": [1] * 4,
    "stage_downsample": [False, True, True, True],
    "stage_downsample_strides": [2] * 4,
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [1] * 4,
}

STAGES3 = ["stage1", "stage2", "stage3"]


def detr(family: str, **options: Any) -> Any:
    return getattr(transformers, f"{family}Config")(backbone_config=resnet("stage2"), **{**DETR, **options})


def _dab_detr() -> Any:
    options = {key: value for key, value in DETR.items() if key != "d_model"}
    return transformers.DabDetrConfig(backbone_config=resnet("stage2"), hidden_size=16, **options)


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


def layout(family: str, first_stage: int, **options: Any) -> Any:
    """Layout of documents: RT-DETR's descendants that give their decoder modules of its owner."""
    stages = [f"stage{k}" for k in range(first_stage, 5)]

    def make() -> Any:
        common = {key: value for key, value in RT_DETR.items() if key != "num_denoising"}
        return getattr(transformers, f"{family}Config")(
            backbone_config=transformers.HGNetV2Config(**HGNET4, out_features=stages),
            **{**common, "hidden_expansion": 1.0, **options},
        )

    return make


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


def _auxiliary(make: Any) -> Any:
    def made() -> Any:
        config = make()
        config.auxiliary_loss = True
        return config

    return made


def lw_detr() -> Any:
    """Three groups of five queries in training, one in evaluation."""
    backbone = transformers.LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        pretrain_image_size=32,
        patch_size=8,
        window_block_indices=[0],
        num_windows=4,
        out_indices=[1, 2],
    )
    return transformers.LwDetrConfig(
        backbone_config=backbone, projector_scale_factors=[1.0], num_feature_levels=1, **GROUPED
    )


def rf_detr(**options: Any) -> Any:
    """The same with a windowed DINOv2."""
    backbone = transformers.RfDetrDinov2Config(
        **DINO, num_windows=2, window_block_indexes=[0], out_indices=[1, 2], reshape_hidden_states=True
    )
    return transformers.RfDetrConfig(backbone_config=backbone, **GROUPED, **options)


DETECTION = [
    _detector("Detr", lambda: detr("Detr")),
    _detector("ConditionalDetr", lambda: detr("ConditionalDetr")),
    _detector("DabDetr", _dab_detr),
    _detector(
        "DeformableDetr",
        lambda: detr(
            "DeformableDetr",
            d_model=32,
            decoder_layers=2,
            num_feature_levels=2,
            decoder_n_points=2,
            encoder_n_points=2,
        ),
    ),
    _detector("TableTransformer", lambda: detr("TableTransformer")),
    _detector("Yolos", _yolos),
    _detector("RTDetr", lambda: _rt_detr("RTDetr"), 64),
    _detector("RTDetrV2", lambda: _rt_detr("RTDetrV2"), 64),
    _detector("DFine", lambda: _d_fine("DFine"), 64),
    *[
        _detector(family, _auxiliary(make), name="auxiliary losses")
        for family, make in {
            "Detr": lambda: detr("Detr"),
            "ConditionalDetr": lambda: detr("ConditionalDetr"),
            "DabDetr": _dab_detr,
            "TableTransformer": lambda: detr("TableTransformer"),
        }.items()
    ],
    _detector("RTDetr", lambda: _rt_detr("RTDetr", num_denoising=0), 64, "without denoising"),
    _detector("Deimv2", lambda: _d_fine("Deimv2"), 64),
    _detector("LwDetr", lw_detr),
    _detector("RfDetr", rf_detr),
    Case(
        "Object detection",
        "PPDocLayoutV3ForObjectDetection",
        layout("PPDocLayoutV3", 1, mask_feature_channels=[8, 8], x4_feat_dim=8, num_prototypes=4),
        64,
        heavy=True,
    ),
    Case("Object detection", "PPDocLayoutV2Model", layout("PPDocLayoutV2", 2), 64, heavy=True),
]
