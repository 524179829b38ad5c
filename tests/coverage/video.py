"""Tiny models of videos: eight or four frames at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.coverage.case import LABELS, SIZES_FROM_DATA, Case, Labels, classes
from tests.coverage.classification import VIT, config


FRAMES = 4


def _frames(name: str) -> Any:
    def inputs(pixels: Tensor) -> dict[str, Any]:
        """(N, 3, H, W) → (N, T, 3, H, W): the picture moves to the left."""
        return {name: torch.stack([pixels.roll(-k, 3) for k in range(FRAMES)], 1)}

    return inputs


def _hidden(pixels: Tensor) -> dict[str, Any]:
    """Half of the 2 x 16 tubes are hidden."""
    mask = (torch.arange(FRAMES // 2 * 16) % 2 == 0).repeat(len(pixels), 1)
    return {**_frames("pixel_values")(pixels), "bool_masked_pos": mask}


def _case(cls: str, family: str, labels: Labels | None = None, name: str = "pixel_values", **options: Any) -> Case:
    make = config(family, num_labels=LABELS, **options)
    return Case("Video", cls, make, 32, labels, inputs=_frames(name), heavy=True)


VIDEOMAE = VIT | {"num_frames": FRAMES, "tubelet_size": 2}
VIVIT = VIT | {"num_frames": FRAMES, "tubelet_size": [2, 8, 8]}
VJEPA2 = {
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": FRAMES,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "mlp_ratio": 2.0,
    "num_pooler_layers": 1,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
}

VIDEO = [
    _case("TimesformerForVideoClassification", "Timesformer", classes, **VIT, num_frames=FRAMES),
    _case("TimesformerModel", "Timesformer", **VIT, num_frames=FRAMES),
    _case("VideoMAEForVideoClassification", "VideoMAE", classes, **VIDEOMAE),
    _case("VideoMAEModel", "VideoMAE", **VIDEOMAE),
    Case(
        "Video",
        "VideoMAEForPreTraining",
        config(
            "VideoMAE",
            **VIDEOMAE,
            decoder_num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=32,
        ),
        32,
        inputs=_hidden,
        not_exported=SIZES_FROM_DATA,
        heavy=True,
    ),
    _case("VivitForVideoClassification", "Vivit", classes, **VIVIT),
    _case("VivitModel", "Vivit", **VIVIT),
    _case("VJEPA2ForVideoClassification", "VJEPA2", classes, "pixel_values_videos", **VJEPA2),
    _case("VJEPA2Model", "VJEPA2", name="pixel_values_videos", **VJEPA2),
]
