from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_qat.errors import CalibrationError, CaptureError
from hf_qat.model.state import state_of
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.trainer.batches import in_order, made_to_differ_in_both, required_labels
from hf_qat.trainer.preparing import examples
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.training import arguments, images


class Needy(nn.Module):
    """Its labels have no default."""

    def forward(self, pixel_values: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return pixel_values


def test_labels_without_a_default_are_required():
    assert required_labels(Needy(), ["labels", "mask", "category"]) == {"labels"}
    assert required_labels(resnet(), ["labels"]) == set()


def test_inputs_by_position_end_at_the_first_gap():
    assert in_order(Needy(), {"labels": 2, "pixel_values": 1}) == (1, 2)
    assert in_order(Needy(), {"pixel_values": 1, "mask": 3}) == (1,)


def test_labels_of_the_arguments_are_no_inputs(tmp_path: Path):
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 1} for _ in range(8)]
    trainer = Trainer(resnet(), arguments(tmp_path), train_dataset=rows)
    found = examples(trainer, trainer.model, None)
    assert found.inputs.keys() == {"pixel_values"} and found.labels.keys() == {"labels"}
    assert list(found.other_sizes) == []


@pytest.mark.parametrize(
    ("first", "other", "made"),
    [((48, 48), (64, 48), (64, 64)), ((48, 64), (48, 80), (64, 80)), ((80, 128), (128, 128), (128, 80))],
)
def test_an_example_of_another_size_differs_in_height_and_width(
    first: tuple[int, int], other: tuple[int, int], made: tuple[int, int]
):
    batches = [
        {"pixel_values": torch.ones(2, 3, *size), "pixel_mask": torch.ones(2, *size)} for size in (first, other)
    ]
    found = made_to_differ_in_both(batches[1], batches[0])
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "pixel_values": (2, 3, *made),
        "pixel_mask": (2, *made),
    }
    covered = min(other[0], made[0]) * min(other[1], made[1])
    assert found["pixel_mask"].sum() == 2 * covered and found["pixel_values"].sum() == 6 * covered
    assert batches[1]["pixel_values"].shape[2:] == other


def test_images_of_every_size_train_where_the_first_ones_differ_in_height_alone(tmp_path: Path):
    sizes = [(32, 32), (48, 32)]
    rows = [{"pixel_values": torch.randn(3, *sizes[k % 2]), "labels": k % 5} for k in range(16)]
    model = resnet().eval()
    wide = torch.randn(1, 3, 40, 64)
    expected = model(wide).logits
    trainer = QATTrainer(model, arguments(tmp_path, per_device_train_batch_size=1), train_dataset=rows)
    with fake_quant_disabled(trainer.model), torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(wide).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_must_have_one_width_is_trained_at_several_heights(tmp_path: Path):
    class Rows(nn.Module):
        """Its last layer takes a whole row."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 32, 5)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.fc(self.conv(pixel_values).relu().mean(2).flatten(1))

    rows = [{"pixel_values": torch.randn(3, (32, 48)[k % 2], 32)} for k in range(4)]
    trainer = QATTrainer(Rows(), arguments(tmp_path, per_device_train_batch_size=1), train_dataset=rows)
    with fake_quant_disabled(trainer.model):
        assert trainer.model(torch.randn(2, 3, 64, 32)).shape == (2, 5)


def test_a_model_that_has_no_data_yet_stays_float_until_it_is_used(tmp_path: Path):
    trainer = QATTrainer(resnet(), arguments(tmp_path))
    assert state_of(trainer.model) is None
    trainer.calibrate(images(8))
    assert state_of(trainer.model) is not None


def test_hooks_that_fail_in_the_constructor_fail_aloud_at_the_first_use(tmp_path: Path):
    class Mine(QATTrainer):
        def get_train_dataloader(self) -> Any:
            return self.loader  # never set

    trainer = Mine(resnet(), arguments(tmp_path), train_dataset=images(8))
    assert state_of(trainer.model) is None
    with pytest.raises(AttributeError, match="loader"):
        trainer.train()


def test_a_model_of_one_size_says_so_and_trains_on_that(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The evaluation set has images of another size, and the classifier takes none but those of the train set."""

    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 8, 8), nn.Linear(4 * 4 * 4, 4)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.head(self.body(pixel_values).flatten(1))
            return {"logits": logits} if labels is None else {"loss": logits.mean(), "logits": logits}

    trainer = QATTrainer(OneSize(), arguments(tmp_path), train_dataset=images(8), eval_dataset=images(4, size=48))
    assert "the model takes those of the first batch only" in caplog.text
    trainer.train()
    with pytest.raises(CaptureError, match="captured for"):
        trainer.evaluate()


def test_a_batch_without_images_says_what_forward_takes(tmp_path: Path):
    rows = [{"image": torch.zeros(3, 32, 32), "label": 1} for _ in range(8)]
    with pytest.raises(
        CalibrationError, match="nothing for ResNetForImageClassification but labels; forward takes pixel"
    ):
        QATTrainer(resnet(), arguments(tmp_path), train_dataset=rows)


@pytest.mark.parametrize("kind", ["train", "several"])
def test_a_transform_of_a_column_that_trainer_leaves_out_is_told_so(tmp_path: Path, kind: str):
    """Such a transform is in transformers' examples of image classification, beside `remove_unused_columns=False`."""

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": torch.tensor(rows["image"]), "labels": rows["label"]}

    rows = {"image": torch.rand(8, 3, 32, 32).tolist(), "label": [0] * 8}
    data = datasets.Dataset.from_dict(rows).with_transform(encode)
    given = {"train_dataset": data} if kind == "train" else {"eval_dataset": {"a": data}}
    with pytest.raises(CalibrationError, match="reads its column 'image'.* set remove_unused_columns=False"):
        QATTrainer(resnet(), arguments(tmp_path), **given)


def test_a_column_that_is_missing_otherwise_is_the_data_set_s_own_error(tmp_path: Path):
    data = datasets.Dataset.from_dict({"label": [0] * 8}).with_transform(
        lambda rows: {"pixel_values": rows["picture"]}
    )
    with pytest.raises(KeyError, match="picture"):
        QATTrainer(resnet(), arguments(tmp_path), train_dataset=data)
