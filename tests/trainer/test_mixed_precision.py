"""A model that was trained before in another precision: by Trainer, in float, as in most notebooks."""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_qat.graph.captured import captured_modules
from hf_qat.trainer.mixed_precision import forget_mixed_precision
from hf_qat.trainer.trainer import QATTrainer
from tests.models import LABELS
from tests.training import arguments, images, recipe, vit


class OnePart(nn.Module):
    """Captured as a whole, for its additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, LABELS)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.stem(pixel_values))
        return {"logits": self.head((torch.relu(self.body(x)) + x).mean((2, 3)))}


def cross_entropy(outputs: Any, labels: Tensor, **kwargs: object) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels)


def loss(directory: Path, make: Callable[[], nn.Module], bf16: bool, before: bool | None) -> float:
    """Of a training step, after a step of Trainer in bf16 or in float32 that leaves the weights, or without any."""
    torch.manual_seed(0)
    model = make()
    for kind, precision in [(Trainer, before), (QATTrainer, bf16)]:
        if precision is None:
            continue
        args = arguments(directory, max_steps=1, learning_rate=0.0, bf16=precision, label_names=["labels"])
        ours = {"qat_config": recipe()} if kind is QATTrainer else {}
        trainer = kind(model, args, train_dataset=images(8), compute_loss_func=cross_entropy, **ours)
        trainer.train()
    assert make is not OnePart or "" in captured_modules(model)
    return trainer.state.log_history[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit, OnePart])
def test_the_precision_is_that_of_the_training_and_not_of_the_one_before(tmp_path: Path, make):
    fresh = {bf16: loss(tmp_path, make, bf16, None) for bf16 in (False, True)}
    assert fresh[False] != fresh[True]
    assert {bf16: loss(tmp_path, make, bf16, not bf16) for bf16 in (False, True)} == fresh


def test_a_forward_that_a_user_gave_to_the_model_is_there_again():
    model = OnePart()
    own = MethodType(lambda self, pixel_values: {"logits": pixel_values}, model)
    model._original_forward, model.forward = own, lambda *args: None
    forget_mixed_precision(model)
    assert model.forward is own
    forget_mixed_precision(model)
    assert model.forward is own
