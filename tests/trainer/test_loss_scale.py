from pathlib import Path

import pytest
import torch

from hf_qat.trainer.loss_scale import Watch
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.training import arguments, images, prepared


def test_computing_with_a_number_is_seen():
    number, x = torch.tensor(4), torch.ones(3)
    for use in (
        lambda: x / number,
        lambda: int(number),
        lambda: number.to(torch.float32),
        lambda: torch.div(x, number),
    ):
        with Watch(number) as watch:
            use()
        assert watch.used


def test_looking_at_its_attributes_or_computing_with_another_is_not():
    number, other = torch.tensor(4), torch.tensor(4)
    with Watch(number) as watch:
        assert number.device.type == "cpu" and number.shape == () and torch.is_tensor(number)
        other / 2
    assert not watch.used


@pytest.mark.parametrize("when", ["from the first training on", "in the second training", "with data that come later"])
def test_four_accumulated_batches_of_a_mean_lose_their_mean(tmp_path: Path, when: str):
    """ResNet takes `**kwargs`, of which Trainer concludes that it divides its loss by the number of images."""
    data, later, second = images(16), when.startswith("with"), when.startswith("in")
    model = prepared(resnet, freeze_bn_at=0.0)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, gradient_accumulation_steps=1 if second else 4)
    trainer = QATTrainer(model, args, train_dataset=None if later else data)
    trainer.train_dataset = data
    if second:
        trainer.train()
        args.gradient_accumulation_steps = 4
    trainer.train()
    columns = data[:]
    with torch.no_grad():
        mean = model(pixel_values=columns["pixel_values"], labels=columns["labels"]).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean, rel=1e-3)
