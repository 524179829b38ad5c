from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_qat.errors import CaptureError
from hf_qat.model.state import state_of
from hf_qat.trainer.batches import in_order, required_labels
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
    assert found.other_size is None


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
