"""Tiny Hugging Face models from config, with weights that keep activations spread out: what several tests prepare.

Fresh weights of Hugging Face models are so small (0.02) that signals die out on the way; a comparison of such outputs
would compare next to nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import transformers
from torch import Tensor, nn


LABELS = 5
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


P = ParamSpec("P")
Made = TypeVar("Made")


def made_once(make: Callable[P, Made]) -> Callable[P, Made]:
    """A decorator: what `make` makes of these arguments is made once in a process; every call gets a copy of it.

    It draws the random numbers of a seed of its own, and none of the test's.
    """
    kept: dict[str, Made] = {}

    @functools.wraps(make)
    def copy_of(*args: P.args, **kwargs: P.kwargs) -> Made:
        key = repr((args, kwargs))
        if key not in kept:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                kept[key] = make(*args, **kwargs)
        return copy.deepcopy(kept[key])

    return copy_of


@dataclass(frozen=True)
class Case:
    """How to make a model, the size of its square images, and the labels of a batch of them."""

    make: Callable[[], nn.Module]
    size: int
    make_labels: Callable[[int, int], object]

    def pixels(self, batch: int, seed: int = 0) -> Tensor:
        """(batch, 3, size, size) float32."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))

    def labels(self, batch: int) -> object:
        """What the model's `labels` argument takes."""
        return self.make_labels(batch, self.size)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Kaiming weights, random batch norm statistics, norms, biases and embeddings; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) and name == "weight":
                nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
            elif isinstance(module, LAYERS) and name == "weight":
                nn.init.kaiming_normal_(parameter, generator=generator)
            else:
                nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0.0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def resnet(labels: int = LABELS) -> nn.Module:
    """Two stages of one basic block each."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=labels
    )
    return spread(transformers.ResNetForImageClassification(config))


def mobilenet_v2() -> nn.Module:
    """The whole net, at the least width."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, image_size=32, num_labels=LABELS)
    return spread(transformers.MobileNetV2ForImageClassification(config))


def regnet() -> nn.Module:
    """Y layers: grouped convolutions and squeeze-excite."""
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=4, layer_type="y", num_labels=LABELS
    )
    return spread(transformers.RegNetForImageClassification(config))


def convnext() -> nn.Module:
    """Depthwise convolutions, layer norms over channels, GELU."""
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, num_labels=LABELS, layer_scale_init_value=0.5
    )
    return spread(transformers.ConvNextForImageClassification(config))


def vit(layers: int = 2, **changes: object) -> nn.Module:
    """16 patches, two heads."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=LABELS,
        **changes,
    )
    return spread(transformers.ViTForImageClassification(config))


def swin() -> nn.Module:
    """Two stages; the second layer of the first one shifts its windows."""
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=LABELS
    )
    return spread(transformers.SwinForImageClassification(config))


def segformer() -> nn.Module:
    """Four stages, as its decoder demands."""
    config = transformers.SegformerConfig(
        hidden_sizes=[4, 8, 8, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=8,
        num_labels=LABELS,
    )
    return spread(transformers.SegformerForSemanticSegmentation(config))


def yolos() -> nn.Module:
    """Five detection tokens."""
    return spread(tiny_yolos(5, LABELS))


def tiny_yolos(tokens: int, classes: int) -> transformers.YolosForObjectDetection:
    """For 32 pixels, with the weights that its class gives it."""
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=tokens,
        num_labels=classes,
    )
    return transformers.YolosForObjectDetection(config)


def detr() -> nn.Module:
    """A ResNet backbone of our own; five queries."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=LABELS,
    )
    return spread(transformers.DetrForObjectDetection(config))


class HandWritten(nn.Module):
    """A user's own network: functional additions, concatenation, pooling and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.body_norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 5)."""
        y = torch.relu(self.stem_norm(self.stem(x)))
        z = nn.functional.relu6(self.body_norm(self.body(y)) + y)
        y = torch.cat([y, z], 1).mean((2, 3))
        return self.head(self.drop(y))


def hand_written() -> nn.Module:
    """`HandWritten`, spread."""
    return spread(HandWritten())


def _classes(batch: int, size: int) -> object:
    return torch.arange(batch) % LABELS


def _masks(batch: int, size: int) -> object:
    return (torch.arange(size * size) % LABELS).view(1, size, size).repeat(batch, 1, 1)


def _boxes(batch: int, size: int) -> object:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]])
    return [{"class_labels": torch.tensor([k % LABELS, 1]), "boxes": box} for k in range(batch)]


HUGGING_FACE = {
    "resnet": Case(resnet, 32, _classes),
    "mobilenet_v2": Case(mobilenet_v2, 32, _classes),
    "regnet": Case(regnet, 32, _classes),
    "convnext": Case(convnext, 32, _classes),
    "vit": Case(vit, 32, _classes),
    "swin": Case(swin, 32, _classes),
    "segformer": Case(segformer, 64, _masks),
    "yolos": Case(yolos, 32, _boxes),
    "detr": Case(detr, 32, _boxes),
}


def checkpoint_layers(model: nn.Module, on: bool = True) -> nn.Module:
    """The model, whose layers are marked to be computed again in backward, or no more."""
    activation = hasattr(model, "activation_checkpointing_enable")  # the name in newer versions of transformers
    name = f"{'activation' if activation else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
    getattr(model, name)()
    return model
