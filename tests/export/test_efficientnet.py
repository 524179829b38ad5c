"""EfficientNet-B0 at its own size: the file that most people run, with ONNX Runtime's integer kernels, against torch.

The weights are random. Batch norm has seen images, and the classifier is fitted to an image of each class, so that the
answers are as sure as those of a trained net: between random logits every rounding decides.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat, verify_onnx


#: Corners of the cube of colours.
CLASSES = 8

#: Of the batch norms before an activation: SiLU is nearly straight there, and small changes stay small.
NORM_BIAS = 2.0


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 224, 224) float32: the colour of a class, a coarse pattern and noise; and the classes, (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    colours = torch.stack([labels // 2**k % 2 * 2.0 - 1 for k in range(3)], 1)[:, :, None, None]
    coarse = nn.functional.interpolate(torch.randn(count, 3, 7, 7, generator=generator), size=224, mode="bilinear")
    return colours + 0.03 * coarse + 0.02 * torch.randn(count, 3, 224, 224, generator=generator), labels


@torch.no_grad()
def efficientnet_b0() -> nn.Module:
    """Random weights, statistics of images, and ridge regression from the features of images to their classes."""
    torch.manual_seed(0)
    config = transformers.EfficientNetConfig(
        image_size=224,
        hidden_dim=1280,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        num_labels=CLASSES,
        drop_connect_rate=0.0,
    )
    model = transformers.EfficientNetForImageClassification(config)
    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02) if "squeeze" in path else nn.init.kaiming_normal_(module.weight)
    for path, norm in norms.items():
        nn.init.ones_(norm.weight)
        nn.init.constant_(norm.bias, 0.0 if "project" in path else NORM_BIAS)
        norm.momentum = 1.0
    pixels, labels = images(3 * CLASSES, seed=1)
    model.train().efficientnet(pixel_values=pixels)
    for norm in norms.values():
        norm.momentum = 0.1
    features = model.eval().efficientnet(pixel_values=pixels).pooler_output
    centre = features.mean(0)
    gram = (features - centre) @ (features - centre).T
    wanted = nn.functional.one_hot(labels).float()
    weight = wanted.T @ torch.linalg.solve(
        gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), features - centre
    )
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(-weight @ centre)
    return model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx_runtime_gives_torchs_answer_for_99_of_100_images_in_either_setting(tmp_path: Path):
    model = efficientnet_b0()
    pixels, _ = images(CLASSES, seed=2)
    batch = {"pixel_values": pixels}
    convert(calibrate(prepare_qat(model, QATConfig(), batch), [batch]))
    file = export_onnx(model, tmp_path / "model.onnx", batch, verify=False).path
    batches = [{"pixel_values": images(20, seed=10 + k)[0]} for k in range(5)]
    with torch.no_grad():
        answers = torch.cat([model(**one).logits.argmax(1) for one in batches[:1]])
    report = verify_onnx(model, file, batches)
    assert report.samples == 100 and set(answers.tolist()) == set(range(CLASSES))
    assert report.plain.top1_agreement >= 0.99 and report.optimized.top1_agreement >= 0.99
