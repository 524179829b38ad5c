"""EfficientNet-B0 at its own size: the file that most people run, with ONNX Runtime's integer kernels, against torch.

The weights are random. Batch norm has seen images, and the classifier knows the mean of each class, so that answers
have the distance from each other that those of a trained net have: between random logits every rounding decides.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat, verify_onnx


CLASSES = 10


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 224, 224) float32: the coarse pattern of a class, and noise; and the classes, (count,)."""
    patterns = torch.randn(CLASSES, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    smooth = nn.functional.interpolate(patterns[labels], size=224, mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, 224, 224, generator=generator), labels


@torch.no_grad()
def efficientnet_b0() -> nn.Module:
    """Random weights, statistics of images, class means as the rows of the classifier."""
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
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for norm in norms:
        nn.init.ones_(norm.weight)
        norm.momentum = 1.0
    pixels, labels = images(2 * CLASSES, seed=1)
    model.train().efficientnet(pixel_values=pixels)
    for norm in norms:
        norm.momentum = 0.1
    features = model.eval().efficientnet(pixel_values=pixels).pooler_output
    means = torch.stack([features[labels == k].mean(0) for k in range(CLASSES)])
    means = nn.functional.normalize(means - means.mean(0), dim=1)
    model.classifier.weight.copy_(means)
    model.classifier.bias.copy_(-means @ features.mean(0))
    return model


@pytest.mark.slow
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
    assert report.samples == 100 and len(set(answers.tolist())) >= 8
    assert report.plain.top1_agreement >= 0.99 and report.optimized.top1_agreement >= 0.99
