"""The devices and models that every bundle test runs over, and something that the models can learn in a few steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from tests.models import HUGGING_FACE, LABELS, Case, spread


#: The devices and the one whose scheme they share: a model is trained and exported once for each scheme.
SCHEMES = {"TDA4VM": "TDA4VM", "AM62A": "AM68A", "AM67A": "AM68A", "AM68A": "AM68A", "AM69A": "AM68A"}
DEVICES = list(SCHEMES)

#: How many frames a bundle of these tests has.
FRAMES = 5

TRAINING_IMAGES = 8

#: Enough to learn the colours, but for the deep and narrow MobileNetV2, which has 80 % dropout.
STEPS = {"mobilenet_v2": 2}

#: So many blocks of one class there are along each side of an image with a class for every pixel.
BLOCKS = 4


def deit() -> nn.Module:
    """16 patches, a class and a distillation token."""
    config = transformers.DeiTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=LABELS,
    )
    return spread(transformers.DeiTForImageClassification(config))


MODELS: dict[str, Case] = {
    **{name: HUGGING_FACE[name] for name in ("resnet", "mobilenet_v2", "regnet", "convnext", "vit", "segformer")},
    "deit": Case(deit, 32, HUGGING_FACE["vit"].make_labels),
}

#: The same, as parameters of a test: every run has a convolutional net and a transformer, the others are slow.
NAMES = [name if name in ("resnet", "vit") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def on_devices(names: Iterable[str], slow: Collection[str]) -> list[object]:
    """(net, device) as parameters of a test: ResNet on all, others once for each scheme; the rest and `slow` slow."""
    cases = [(name, device) for name in names for device in DEVICES]
    quick = [case for case in cases if case[0] not in slow and (case[0] == "resnet" or case[1] in SCHEMES.values())]
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases]


#: All nets of the bundles on all devices.
ON_DEVICES = on_devices(MODELS, slow=MODELS.keys() - {"resnet", "vit"})

#: Those whose optimizations ONNX Runtime must leave off.
TRANSFORMERS = {"convnext", "vit", "deit", "segformer"}


def scenes(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of the colour of their class, and the classes.

    Returns:
        (count, 3, H, W) float32, and int64: (count,), or (count, H, W) for segmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    size, colours = MODELS[name].size, 1.5 * torch.randn(LABELS, 3, generator=torch.Generator().manual_seed(7))
    noise = 0.3 * torch.randn(count, 3, size, size, generator=generator)
    if name != "segformer":
        labels = torch.arange(count) % LABELS
        return noise + colours[labels][:, :, None, None], labels
    blocks = torch.randint(LABELS, (count, BLOCKS, BLOCKS), generator=generator)
    labels = blocks.repeat_interleave(size // BLOCKS, 1).repeat_interleave(size // BLOCKS, 2)
    return noise + colours[labels].permute(0, 3, 1, 2), labels


def trained(name: str, scheme: str) -> nn.Module:
    """A model, prepared, calibrated, trained a little, and converted."""
    pixels, labels = scenes(name, TRAINING_IMAGES, seed=0)
    model = calibrate(prepare_qat(MODELS[name].make(), QATConfig(scheme), {"pixel_values": pixels}), [pixels])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(STEPS.get(name, 12)):
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    return convert(model.eval())
