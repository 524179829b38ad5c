"""The whole table, and what is refused: with the walk over transformers' own mappings that checks it for gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.coverage.backbones import BACKBONES
from tests.coverage.base_models import base_models, masked_models
from tests.coverage.case import LABELS, Case
from tests.coverage.classification import CLASSIFICATION, VIT
from tests.coverage.dense import DENSE
from tests.coverage.depth import DEPTH
from tests.coverage.detection import DETECTION
from tests.coverage.plain import PLAIN
from tests.coverage.segmentation import SEGMENTATION
from tests.coverage.towers import TOWERS
from tests.coverage.universal import UNIVERSAL
from tests.coverage.video import VIDEO


TASK_MODELS = [*CLASSIFICATION, *SEGMENTATION, *DEPTH, *DETECTION, *UNIVERSAL, *BACKBONES]

CASES: list[Case] = [
    *TASK_MODELS,
    *DENSE,
    *masked_models(TASK_MODELS),
    *VIDEO,
    *TOWERS,
    *base_models(TASK_MODELS),
    *PLAIN,
]

#: Mappings of which every class must be in the table or refused with a reason.
COMPLETE = ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "BACKBONE")

#: Mappings of a few classes only, of which the same holds.
SMALL = ("INSTANCE_SEGMENTATION", "MASKED_IMAGE_MODELING", "KEYPOINT_DETECTION")
#: Classes that take no pixels, or that a missing library keeps from being built.
REFUSED = {
    "DinatForImageClassification": "needs natten, whose attention is a kernel of its own",
    "DinatBackbone": "needs natten, whose attention is a kernel of its own",
    "ImageGPTForImageClassification": "takes colour clusters as tokens (input_ids), no pixels",
    "ShieldGemma2ForImageClassification": "takes a text beside the image and answers as a language model",
    "TimmWrapperForImageClassification": "needs timm; tested where it imports",
    "TimmBackbone": "needs timm; tested where it imports",
}


def mapped_classes(task: str) -> list[str]:
    """Names of the classes in a mapping of transformers, in its order."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task != "BACKBONE" else BACKBONE_MAPPING)
    names: list[str] = []
    for entry in mapping.values():
        names += [entry] if isinstance(entry, str) else list(entry)
    return list(dict.fromkeys(names))


BACKBONE_MAPPING = "MODEL_FOR_BACKBONE_MAPPING_NAMES"


def covered_classes() -> set[str]:
    """Names of the transformers classes in the table."""
    return {case.cls for case in CASES if isinstance(case.cls, str)}


def image_gpt() -> nn.Module:
    """Sixteen tokens a picture."""
    config = transformers.ImageGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=16, num_labels=LABELS)
    return transformers.ImageGPTForImageClassification(config)


def shield_gemma() -> nn.Module:
    """One layer of each of its halves."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 128,
    }
    config = transformers.ShieldGemma2Config(text_config=text, vision_config=VIT, mm_tokens_per_image=4)
    return transformers.ShieldGemma2ForImageClassification(config)


#: Models that can be built and must be refused, with what a user would try them on.
REFUSALS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ImageGPTForImageClassification": (image_gpt, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "ShieldGemma2ForImageClassification": (shield_gemma, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
}
