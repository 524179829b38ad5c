from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_qat import QATConfig, parameter_groups, prepare_qat
from hf_qat.export.runtime_model import RuntimeModel
from hf_qat.trainer.distillation import Distillation
from hf_qat.trainer.suspicions import (
    LARGEST_STEP,
    ImageStatistics,
    relative_step,
    warn_against_recipe,
    warn_of_few_samples,
    warn_of_lost_accuracy,
)
from tests.exported import publisher
from tests.training import arguments, images, prepared, recipe, trainer_of, vit


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
    trainer_of(prepared(vit), tmp_path, eval_dataset=raw, max_steps=1, eval_strategy="steps", eval_steps=1).train()
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


def small_net(**changes: object) -> nn.Module:
    """A convolution, with or without a batch norm, and a linear layer, whose weights are all 0.1 or -0.1."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    for layer in (model[0], model[4]):
        nn.init.constant_(layer.weight, 0.1)
        layer.weight.data[0] = -0.1
    model[1].weight.data.copy_(torch.linspace(0.5, 1.5, 4))  # as training leaves them
    model[1].running_mean.fill_(0.1)
    return prepare_qat(model, QATConfig(**changes), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("rate", "warned"), [(2e-4, False), (0.9 * LARGEST_STEP / 10, False), (0.02, True)])
def test_a_rate_that_changes_much_of_a_weight_in_a_step_is_warned_of_at_8_bits(rate: float, warned: bool, caplog):
    """A rate of 0.02 changes a fifth of weights of 0.1, of Adam's; the scales' own rate does not count."""
    for target in ("int8", "w4a4"):
        model = small_net(target=target)
        optimizer = torch.optim.AdamW(parameter_groups(model, rate, 0.0))
        warn_against_recipe(model, QATConfig(target), optimizer)
    assert caplog.text.count("changes half of the layers by more than") == warned
    assert relative_step(model, rate) == pytest.approx(10 * rate)


def test_what_is_no_adam_may_have_any_rate(caplog):
    model = small_net()
    warn_against_recipe(model, QATConfig(), torch.optim.SGD(model.parameters(), lr=0.5))
    assert "learning rate" not in caplog.text


@pytest.mark.parametrize("one", [True, False], ids=["one peak", "a peak for each group"])
def test_a_scheduler_that_gives_scales_the_rate_of_weights_is_warned_of_and_its_peak_counts(one: bool, caplog):
    model = small_net()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02, 0.0))
    peaks = 0.02 if one else [group["lr"] for group in optimizer.param_groups]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=10)
    warn_against_recipe(model, QATConfig(), optimizer)
    assert ("gives learned scales the learning rate of the weights, and not 10 times" in caplog.text) is one
    assert "changes half of the layers by more than" in caplog.text


def test_decay_of_scales_is_warned_of_with_their_number(caplog):
    model = small_net()
    own = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    expected = sum(name.endswith(("log2_scale", "offset")) for name, _ in model.named_parameters())
    warn_against_recipe(model, QATConfig(), own)
    assert f"Weight decay draws {expected} learned scales" in caplog.text
    caplog.clear()
    warn_against_recipe(model, QATConfig(), torch.optim.AdamW(parameter_groups(model, 1e-5, 0.01)))
    assert "decay" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"target": "w4a4", "freeze_bn_at": 0.5}, True),
        ({"target": "w4a4"}, False),
        ({"target": "int8", "freeze_bn_at": 0.5}, False),
    ],
    ids=str,
)
def test_a_batch_norm_that_is_live_at_four_bits_is_warned_of(changes: dict, warned: bool, caplog):
    model, config = small_net(**changes), QATConfig(**changes)
    warn_against_recipe(model, config, torch.optim.AdamW(parameter_groups(model, 1e-5, 0.0)))
    assert ("Batch norm is live for the first 50% of a training at 4 bits" in caplog.text) is warned


def test_a_net_that_is_not_trained_yet_may_learn_fast_and_by_its_batches(caplog):
    model, config = small_net(target="int8"), QATConfig("int8")
    nn.init.ones_(model[1].weight)
    warn_against_recipe(model, config, torch.optim.AdamW(parameter_groups(model, 0.02, 0.0)))
    assert "learning rate" not in caplog.text


def test_a_trainer_warns_once_when_training_begins(tmp_path: Path, caplog):
    model = prepared(vit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    given = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer_of(model, tmp_path, max_steps=2, optimizers=given).train()
    assert caplog.text.count("Weight decay draws") == 1


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
def test_an_export_that_computes_otherwise_than_the_trained_model_is_warned_of(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    class Miscompiled(RuntimeModel):
        """Its scores are twice as large."""

        def forward(self, **inputs: object):
            outputs = super().forward(**inputs)
            outputs.logits = 2 * outputs.logits
            return outputs

    score = {"compute_metrics": lambda prediction: {"score": float(abs(prediction.predictions).mean())}}
    trainer = publisher(tmp_path, "int8", **score)
    trainer.calibrate()
    monkeypatch.setattr("hf_qat.trainer.measuring.RuntimeModel", Miscompiled)
    trainer.export(tmp_path / "bad")
    assert "The converted model differs from the trained one: score is" in caplog.text
