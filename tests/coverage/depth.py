"""Tiny models of depth estimation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.coverage.case import Case
from tests.coverage.classification import DINO, PYRAMID
from tests.coverage.segmentation import BEIT4, DPT, STAGES, VIT4, tipsv2_config


DINO4 = DINO | {"num_hidden_layers": 4, "reshape_hidden_states": False, "out_features": STAGES}


def _case(family: str, make: Callable[[], Any], size: int = 32, name: str = "") -> Case:
    return Case(
        "Depth estimation",
        f"{family}ForDepthEstimation",
        make,
        size,
        None,
        name,
        heavy=family not in ("DPT", "DepthAnything", "GLPN"),
    )


def _dpt() -> Any:
    return transformers.DPTConfig(**VIT4, **DPT)


def _dpt_dinov2() -> Any:
    return transformers.DPTConfig(
        backbone_config=transformers.Dinov2Config(**DINO4), neck_hidden_sizes=[4, 8, 8, 16], fusion_hidden_size=8
    )


def _depth_anything(cls: str) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(transformers, cls)(
            backbone_config=transformers.Dinov2Config(**DINO4),
            patch_size=8,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[4, 8, 8, 16],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )

    return make


def _glpn() -> Any:
    sizes = {key: value for key, value in PYRAMID.items()}
    return transformers.GLPNConfig(**sizes, decoder_hidden_size=8, drop_path_rate=0.0)


def _zoedepth() -> Any:
    backbone = transformers.BeitConfig(**BEIT4, out_features=STAGES, reshape_hidden_states=False)
    return transformers.ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[4, 8, 8, 16],
        fusion_hidden_size=8,
        bottleneck_features=8,
        bin_embedding_dim=8,
        num_relative_features=8,
        num_attractors=[4, 4, 2, 1],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    )


def _chmv2() -> Any:
    backbone = transformers.DINOv3ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_register_tokens=2,
        out_features=STAGES,
        reshape_hidden_states=True,
        return_class_token=True,
    )
    return transformers.CHMv2Config(
        backbone_config=backbone,
        patch_size=8,
        post_process_channels=[4, 8, 8, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        number_output_channels=8,
    )


DEPTH = [
    _case("DPT", _dpt),
    _case("DPT", _dpt_dinov2, name="DINOv2 backbone"),
    _case("DepthAnything", _depth_anything("DepthAnythingConfig")),
    _case("PromptDepthAnything", _depth_anything("PromptDepthAnythingConfig")),
    _case("GLPN", _glpn),
    _case("ZoeDepth", _zoedepth),
    _case("CHMv2", _chmv2),
    _case("Tipsv2Dpt", tipsv2_config),
]
