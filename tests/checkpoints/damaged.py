"""Checkpoints of a tiny ResNet, to be read, and to be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from tests.models import HUGGING_FACE


RESNET = HUGGING_FACE["resnet"]
STEM = "resnet.embedder.embedder.convolution"
OUT = f"{STEM}.activation_quantizer"

Tensors = dict[str, np.ndarray]


def quantized(config: QATConfig | None = None) -> nn.Module:
    model = prepare_qat(RESNET.make().eval(), config, {"pixel_values": RESNET.pixels(2)})
    return convert(calibrate(model, [RESNET.pixels(4, 1)]))


def copied(directory: Path, target: Path) -> Path:
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def load(directory: Path) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_pretrained(directory)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by its specification: u64 length, JSON, data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
