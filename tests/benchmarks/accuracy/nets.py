"""The nets of the table, small enough to be trained from scratch in minutes on a CPU, and how that is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig

from tests.benchmarks.accuracy.textures import CLASSES, SIDE


#: Standard deviation of the first weights of nets that begin with 0.02 in transformers: about one over the root of how
#: many numbers are summed. 0.02 is made for widths of 768; narrow nets stay at the loss of guessing with it, for a
#: thousand steps or, where the epsilon of batch norm (0.001) is then larger than the variances, for ever.
OF_TRANSFORMERS, OF_CONVOLUTIONS = 0.1, 0.2


@dataclass(frozen=True)
class Net:
    """A net of the table.

    Attributes:
        make: a new one, with random weights.
        learning_rate: of AdamW with a cosine schedule, from scratch.
        epochs: of the float training.
        batch: of all trainings.
        warmup: the share of the float training in which the rate rises.
        dense: it says of each pixel what it is, not of the whole image.
        kind: in the name of the recipe that it is quantized by.
        teacher: the net whose answers it learns with the labels, as transformers need on few images
            (Touvron et al., "Training data-efficient image transformers", 2021, 4).
    """

    make: Callable[[], nn.Module]
    learning_rate: float
    epochs: int
    batch: int = 32
    warmup: float = 0.05
    dense: bool = False
    kind: str = "cnn"
    teacher: str | None = None


def _classes(outputs: int = len(CLASSES)) -> dict[str, Any]:
    names = [*CLASSES, "background"][:outputs]
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _of(model: type[nn.Module], config: type[PretrainedConfig], **options: Any) -> Callable[[], nn.Module]:
    """Makes `model` of `config` with `options`, whose batch norms have statistics of more than the last batch.

    Those of MobileNetV2 in transformers have a momentum of 0.997, TensorFlow's 0.003 the wrong way round.
    """

    def make() -> nn.Module:
        net = model(config(**{**_classes(), **options}))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.05
        return net

    return make


NETS = {
    "MobileNetV2": Net(
        _of(
            transformers.MobileNetV2ForImageClassification,
            transformers.MobileNetV2Config,
            image_size=SIDE,
            depth_multiplier=0.35,
            output_stride=16,  # its last kernels of 3 × 3 would see maps of 2 × 2
            finegrained_output=False,
            classifier_dropout_prob=0.1,
        ),
        kind="depthwise",
        learning_rate=2e-3,
        epochs=20,
        warmup=0.1,
    ),
    "ResNet": Net(
        _of(
            transformers.ResNetForImageClassification,
            transformers.ResNetConfig,
            embedding_size=24,
            hidden_sizes=[24, 48, 72, 96],
            depths=[1, 1, 1, 1],
            layer_type="basic",
        ),
        learning_rate=3e-3,
        epochs=8,
    ),
    "RegNet": Net(
        _of(
            transformers.RegNetForImageClassification,
            transformers.RegNetConfig,
            embedding_size=16,
            hidden_sizes=[24, 48, 96, 128],
            depths=[1, 1, 2, 1],
            groups_width=8,
            layer_type="y",
        ),
        learning_rate=3e-3,
        epochs=20,
    ),
    "EfficientNet": Net(
        _of(
            transformers.EfficientNetForImageClassification,
            transformers.EfficientNetConfig,
            image_size=SIDE,
            width_coefficient=0.35,
            depth_coefficient=0.5,
            hidden_dim=448,
            dropout_rate=0.1,
            drop_connect_rate=0.05,
            initializer_range=OF_CONVOLUTIONS,
        ),
        kind="depthwise",
        learning_rate=3e-3,
        epochs=32,
        batch=64,
        warmup=0.1,
    ),
    "ConvNeXt": Net(
        _of(
            transformers.ConvNextForImageClassification,
            transformers.ConvNextConfig,
            image_size=SIDE,
            hidden_sizes=[24, 48, 72, 96],
            depths=[1, 1, 2, 1],
            patch_size=2,
            layer_scale_init_value=1.0,
            initializer_range=OF_CONVOLUTIONS,
        ),
        kind="transformer",  # it has their norms and activations, and learns at their rate
        learning_rate=1e-3,
        epochs=24,
        warmup=0.1,
    ),
    "ViT": Net(
        _of(
            transformers.ViTForImageClassification,
            transformers.ViTConfig,
            image_size=SIDE,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            initializer_range=OF_TRANSFORMERS,
        ),
        kind="transformer",
        learning_rate=1e-3,
        epochs=48,
        batch=64,
        warmup=0.1,
        teacher="ResNet",
    ),
    "MobileViT": Net(
        _of(
            transformers.MobileViTForImageClassification,
            transformers.MobileViTConfig,
            image_size=SIDE,
            hidden_sizes=[32, 48, 64],
            neck_hidden_sizes=[16, 16, 24, 32, 48, 64, 160],
            num_attention_heads=4,
            expand_ratio=2.0,
            output_stride=16,  # its last patches of 2 × 2 would be the whole map
            hidden_dropout_prob=0.0,
            initializer_range=OF_TRANSFORMERS,
        ),
        kind="transformer",
        learning_rate=2e-3,
        epochs=24,
        warmup=0.1,
        teacher="ResNet",
    ),
    "Swin": Net(
        _of(
            transformers.SwinForImageClassification,
            transformers.SwinConfig,
            image_size=SIDE,
            patch_size=4,
            embed_dim=32,
            depths=[2, 2, 2],
            num_heads=[2, 4, 4],
            window_size=4,
            drop_path_rate=0.0,
            initializer_range=OF_TRANSFORMERS,
        ),
        kind="transformer",
        learning_rate=1e-3,
        epochs=32,
        batch=64,
        warmup=0.1,
        teacher="ResNet",
    ),
    "SegFormer": Net(
        _of(
            transformers.SegformerForSemanticSegmentation,
            transformers.SegformerConfig,
            hidden_sizes=[16, 32, 64, 96],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=64,
            drop_path_rate=0.0,
            initializer_range=OF_TRANSFORMERS,
            **_classes(len(CLASSES) + 1),
        ),
        kind="transformer",
        learning_rate=2e-3,
        epochs=20,
        dense=True,
    ),
}
