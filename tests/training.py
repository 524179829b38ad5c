"""Tiny data and arguments for tests that train with a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_qat.config.qat_config import QATConfig
from hf_qat.model.prepare import prepare_qat
from hf_qat.trainer.trainer import QATTrainer
from tests.models import LABELS, made_once
from tests.models import vit as vit_of


#: Scales that follow the running range of the data, instead of being learned.
FOLLOWED = {
    "weights": {"learned": False, "observer": "minmax"},
    "activations": {"learned": False, "observer": "moving_average"},
}


def images(count: int, size: int = 32, seed: int = 0) -> datasets.Dataset:
    """Noise, with a bright square in a place that tells the class; and a column that no model takes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.arange(count) % LABELS
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, 4 * label : 4 * label + 8, 4 * label : 4 * label + 8] += 2.0
    columns = {"pixel_values": pixels.numpy(), "labels": labels.numpy(), "name": [str(k) for k in range(count)]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def arguments(directory: Path, **changes: object) -> TrainingArguments:
    """Four steps of four images, quietly and on the CPU."""
    defaults: dict[str, object] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(directory), **{**defaults, **changes})


def recipe(**changes: object) -> QATConfig:
    """Two calibration batches; batch norm freezes half way, ranges after three quarters."""
    defaults: dict[str, object] = {"freeze_bn_at": 0.5, "freeze_ranges_at": 0.75, "calibration_batches": 2}
    return QATConfig(**{**defaults, **changes})


def vit(**changes: object) -> nn.Module:
    """One layer, which is faster than two."""
    return vit_of(layers=1, **changes)


@made_once
def prepared(make: Callable[[], nn.Module], **qat: object) -> nn.Module:
    """The model of `make`, prepared by `recipe(**qat)` for `images`."""
    columns = images(4)[:]
    batch = {name: columns[name] for name in ("pixel_values", "labels")}
    return prepare_qat(make(), recipe(**qat), batch)


def trainer_of(model: nn.Module, directory: Path, *, qat: dict | None = None, **changes: object) -> QATTrainer:
    """A trainer on 16 images; `changes` are Trainer's arguments by keyword, or those of TrainingArguments."""
    names = inspect.signature(Trainer).parameters.keys() | {"teacher"}
    mine = {name: changes.pop(name) for name in list(changes) if name in names}
    mine = {"train_dataset": images(16), "eval_dataset": images(10, seed=1), **mine}
    return QATTrainer(model, arguments(directory, **changes), qat_config=recipe(**(qat or {})), **mine)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def values_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, under the names of the file."""
    return load_file(checkpoint / "model.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Keys whose values differ in any bit; both have the same keys."""
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]
