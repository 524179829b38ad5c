"""Tiny segmenters of instances and of everything, with Hugging Face's own matching losses."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.coverage.case import LABELS, SIZES_FROM_DATA, Case, boxes
from tests.coverage.classification import SWIN, VIT
from tests.coverage.detection import DETR, resnet, rf_detr
from tests.coverage.segmentation import RESNET4, STAGES


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
    decoder = transformers.DetrConfig(**{**DETR, "num_labels": LABELS}, backbone_config=resnet("stage2"))
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


def _oneformer(training: bool) -> Any:
    return lambda: transformers.OneFormerConfig(
        backbone_config=_swin(),
        is_training=training,
        num_queries=5,
        train_num_points=64,
        task_seq_len=7,
        text_encoder_width=64,
        text_encoder_context_length=7,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=32,
        text_encoder_n_ctx=1,
        conv_dim=64,
        mask_dim=64,
        hidden_dim=64,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=32,
        query_dec_layers=1,
        num_labels=LABELS,
    )


def _task(pixels: Tensor) -> dict[str, Any]:
    """The task as tokens beside the image."""
    return {"pixel_values": pixels, "task_inputs": torch.arange(7).repeat(len(pixels), 1)}


def _task_and_texts(pixels: Tensor) -> dict[str, Any]:
    """A text a query beside."""
    texts = (torch.arange(4 * 7).view(1, 4, 7) % 32).repeat(len(pixels), 1, 1)
    return {**_task(pixels), "text_inputs": texts}


EOMT = {
    "num_blocks": 1,
    "num_queries": 4,
    "num_upscale_blocks": 1,
    "num_register_tokens": 2,
    "train_num_points": 64,
    "num_labels": LABELS,
}


def _eomt(name: str) -> Any:
    return lambda: getattr(transformers, f"{name}Config")(**{**VIT, "num_hidden_layers": 3}, **EOMT)


def masked_boxes(batch: int, size: int) -> dict[str, Any]:
    """Two boxes an image, with their masks."""
    labels = boxes(batch, size)["labels"]
    for label in labels:
        label["masks"] = torch.zeros(2, size, size)
        label["masks"][:, size // 4 : size // 2, size // 4 :] = 1
    return {"labels": labels}


def _detr(family: str) -> Any:
    """Wide enough for the mask head, which divides the width by 64 at the end, and takes four feature maps."""
    backbone = transformers.ResNetConfig(**RESNET4, out_features=STAGES)
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    return lambda: getattr(transformers, f"{family}Config")(
        backbone_config=backbone, **{**DETR, **heads, "d_model": 64}
    )


def _case(cls: str, make: Any, size: int, labels: Any = segments, **options: Any) -> Case:
    return Case("Universal segmentation", cls, make, size, labels, heavy=True, **options)


UNIVERSAL = [
    _case("MaskFormerForInstanceSegmentation", _maskformer, 64),
    _case("Mask2FormerForUniversalSegmentation", _mask2former, 64),
    _case("OneFormerForUniversalSegmentation", _oneformer(False), 64, None, inputs=_task),
    _case("OneFormerForUniversalSegmentation", _oneformer(True), 64, inputs=_task_and_texts, name="training"),
    _case("OneFormerModel", _oneformer(False), 64, None, inputs=_task),
    _case("EomtForUniversalSegmentation", _eomt("Eomt"), 32, not_exported=SIZES_FROM_DATA),
    _case("EomtDinov3ForUniversalSegmentation", _eomt("EomtDinov3"), 32, not_exported=SIZES_FROM_DATA),
    _case("DetrForSegmentation", _detr("Detr"), 64, masked_boxes),
    _case("ConditionalDetrForSegmentation", _detr("ConditionalDetr"), 64, masked_boxes),
    _case("RfDetrForInstanceSegmentation", rf_detr, 32, masked_boxes, loss_in_evaluation=False),
]
