from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_qat.export.runtime_model import RuntimeModel
from hf_qat.trainer.distillation import Distillation
from hf_qat.trainer.suspicions import ImageStatistics, warn_of_few_samples, warn_of_lost_accuracy
from tests.exported import publisher
from tests.training import arguments, images, recipe, trainer_of, vit


#: Images as data sets have them, by their mean and standard deviation.
NORMALISED = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PREPARED: dict[str, tuple[torch.Tensor, bool]] = {
    "the same": (NORMALISED.clone(), False),
    "a brighter batch of two": (NORMALISED[:2] * 1.2 + 0.5, False),
    "blurred, as crops of small images are": (NORMALISED * 0.6, False),
    "from 0 to 1": ((NORMALISED * 0.25 + 0.45).clamp(0, 1), True),
    "from 0 to 255": ((NORMALISED * 57 + 115).clamp(0, 255), True),
    "normalised twice": ((NORMALISED - 0.45) / 0.225, True),
}


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_images_that_are_prepared_otherwise_are_warned_of_once(name: str, first: str, caplog):
    other, suspicious = PREPARED[name]
    found, model = ImageStatistics(), nn.Identity()
    for where in (first, "evaluation" if first == "training" else "training") * 2:
        found.look_at(model, {"pixel_values": NORMALISED if where == "training" else other}, where)
    assert caplog.text.count("Images of evaluation are prepared otherwise") == suspicious


@pytest.mark.parametrize("inputs", [{}, {"pixel_values": torch.ones(3, 4)}, {"pixel_values": torch.ones(1, 1, 1, 1)}])
def test_what_are_no_images_is_left_alone(inputs: dict, caplog):
    found = ImageStatistics()
    for where in ("training", "evaluation"):
        found.look_at(nn.Identity(), inputs, where)
    assert caplog.text == ""


def test_a_trainer_warns_of_an_evaluation_set_that_is_not_normalised(tmp_path: Path, caplog):
    rows = images(8)[:]
    raw = [
        {"pixel_values": pixels * 57 + 115, "labels": label}
        for pixels, label in zip(rows["pixel_values"], rows["labels"], strict=True)
    ]
    trainer_of(vit(), tmp_path, eval_dataset=raw, max_steps=1, eval_strategy="steps", eval_steps=1).train()
    assert "mean is 122" in caplog.text and "Normalise both alike" in caplog.text


@pytest.mark.parametrize(
    ("batch", "freeze_at", "steps", "words"),
    [
        (2, 0.5, 100, "batches of 2 for 50 steps"),
        (2, 0.0, 100, ""),
        (8, 0.5, 100, ""),
        (8, 0.5, 10, ""),  # of a trained model: it keeps what it has
    ],
)
def test_few_samples_for_batch_norm_are_warned_of(
    batch: int, freeze_at: float, steps: int, words: str, tmp_path, caplog
):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].num_batches_tracked.fill_(100)
    args = arguments(tmp_path, per_device_train_batch_size=batch)
    warn_of_few_samples(model, recipe(), freeze_at, args, steps)
    assert (words in caplog.text) if words else caplog.text == ""


def test_few_steps_for_untrained_batch_norms_are_warned_of(tmp_path: Path, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    warn_of_few_samples(model, recipe(), 0.5, arguments(tmp_path, per_device_train_batch_size=8), 10)
    assert "for 5 steps only: too few samples" in caplog.text


@pytest.mark.parametrize(
    ("exported", "images", "warned"),
    [
        (0.9, 1000, False),
        (0.89, 1000, False),
        (0.85, 1000, True),
        (0.86, 50, False),
        (0.5, 50, True),
        (float("nan"), 0, True),
    ],
)
def test_a_file_of_another_accuracy_is_warned_of(exported: float, images: int, warned: bool, caplog):
    warn_of_lost_accuracy({"qat": {"accuracy": 0.9}, "onnxruntime": {"accuracy": exported}}, "qat", images)
    assert ("The converted model differs from the trained one: accuracy is" in caplog.text) is warned


def test_a_teacher_in_training_mode_is_put_back_and_warned_of(caplog):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.drop(self.head(x))}

    net, x = Net(), torch.randn(5, 4)
    distillation = Distillation(net, 2.0, torch.device("cpu"))
    outputs = {"logits": net(x)["logits"].clone()}
    assert distillation.loss(net, outputs, {"x": x}) == 0
    assert caplog.text == ""
    net.train()
    assert distillation.loss(net, outputs, {"x": x}) == 0  # with dropout, it would not be
    assert "The teacher is in training mode" in caplog.text and not net.drop.training


@pytest.mark.slow
def test_an_export_that_predicts_otherwise_than_the_trained_model_is_warned_of(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    class Miscompiled(RuntimeModel):
        """Its classes come in another order."""

        def forward(self, **inputs: object):
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits.roll(1, -1)
            return outputs

    trainer = publisher(tmp_path, "AM68A", max_steps=24)
    trainer.train()
    trainer.export(tmp_path / "good")
    assert "differs from the trained one" not in caplog.text
    monkeypatch.setattr("hf_qat.trainer.measuring.RuntimeModel", Miscompiled)
    trainer.export(tmp_path / "bad")
    assert "The converted model differs from the trained one: accuracy is" in caplog.text
