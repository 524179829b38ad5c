"""Tiny base models, without a head: each from the config of the task model of its family, or of its backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tests.coverage.case import Case
from tests.coverage.classification import config


#: Ends of the names of the classes whose configs the base models of the same family take.
TASKS = (
    "ForImageClassification",
    "ForSemanticSegmentation",
    "ForDepthEstimation",
    "ForObjectDetection",
    "ForInstanceSegmentation",
    "ForUniversalSegmentation",
    "Backbone",
)

#: Families whose base model is called `<family>Model`.
FAMILIES = (
    *("Beit", "Bit", "ConvNext", "ConvNextV2", "Cvt", "Data2VecVision", "DeiT", "Dinov2", "Dinov2WithRegisters"),
    *("DonutSwin", "EfficientNet", "FocalNet", "Hiera", "IJepa", "Levit", "MobileNetV1", "MobileNetV2", "MobileViT"),
    *("MobileViTV2", "PoolFormer", "Pvt", "PvtV2", "RegNet", "ResNet", "Segformer", "SwiftFormer", "Swin", "Swinv2"),
    *("TextNet", "ViT", "ViTMSN", "DPT", "GLPN", "VitDet", "DINOv3ViT", "DINOv3ConvNext", "Pixio", "MaskFormerSwin"),
    *("MaskFormer", "Mask2Former", "Detr", "ConditionalDetr", "DabDetr", "DeformableDetr", "TableTransformer"),
    *("Yolos", "RTDetr", "RTDetrV2", "DFine", "Deimv2", "LwDetr", "RfDetr", "Sapiens2", "Tipsv2Vision"),
    "PPDocLayoutV3",
)

#: Families whose base model is not exported, and why.
NOT_EXPORTED = {"MaskFormerSwin": "refused: it returns sizes beside tensors"}

#: Families that predict hidden patches.
MASKED = ("Beit", "DeiT", "FocalNet", "Swin", "Swinv2", "ViT")

#: What masked image modelling reconstructs the pixels with: one stride for all of its encoder.
STRIDES = {"Swin": 8, "Swinv2": 8, "FocalNet": 8, "DeiT": 8, "ViT": 8}


def base_models(cases: Iterable[Case]) -> list[Case]:
    """A row for each family."""
    return [_base(first_of(family, cases), family) for family in FAMILIES]


def masked_models(cases: Iterable[Case]) -> list[Case]:
    """Masked image modelling: half of the patches are hidden."""
    return [_masked(first_of(family, cases), family) for family in MASKED]


def first_of(family: str, cases: Iterable[Case]) -> Case:
    """The first row of a family in the table."""
    names = [f"{family}{task}" for task in TASKS]
    return next(case for case in cases if case.cls in names)


def _base(case: Case, family: str) -> Case:
    why = NOT_EXPORTED.get(family, "")
    return Case(
        "Base models", f"{family}Model", case.config, case.size, inputs=case.inputs, not_exported=why, heavy=True
    )


def _masked(case: Case, family: str) -> Case:
    make: Callable[[], Any] | None = case.config

    def strided() -> Any:
        assert make is not None
        made = make()
        if family in STRIDES:
            made.encoder_stride = STRIDES[family]
        made.use_mask_token = True
        return made

    def hidden(pixels: Tensor) -> dict[str, Any]:
        patches = (case.size // 8) ** 2 if family in ("Beit", "DeiT", "ViT") else (case.size // 4) ** 2
        return {"pixel_values": pixels, "bool_masked_pos": (torch.arange(patches) % 2 == 0).repeat(len(pixels), 1)}

    cls = f"{family}ForMaskedImageModeling"
    return Case("Masked image modelling", cls, strided, case.size, inputs=hidden, heavy=True)


def tower(cls: str, config_name: str, **options: Any) -> Case:
    """The vision half of a model of images and text."""
    return Case("Vision towers", cls, config(config_name, **options), 32, heavy=True)
