from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_qat.errors import CalibrationError
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.batches import batches_of_another_size, first_batch, first_inputs, inputs_of, without_labels
from hf_qat.trainer.trainer import QATTrainer
from tests.graph.capture.test_ways import MoreQueries, boxes
from tests.models import resnet
from tests.training import arguments, images, recipe


def plain(directory: Path, **changes: object) -> Trainer:
    """A trainer of transformers, with batches of 4 to train and 8 to evaluate."""
    data = {name: changes.pop(name, None) for name in ("train_dataset", "eval_dataset")}
    return Trainer(resnet(), arguments(directory, **changes), **data)


def first(directory: Path, count: int, **changes: object) -> list[dict]:
    """What `first_inputs` reads."""
    trainer = plain(directory, **changes)
    return first_inputs(trainer, trainer.model, count)


def test_the_first_batch_is_the_one_that_training_sees_first_with_its_labels(tmp_path: Path):
    trainer = plain(tmp_path, train_dataset=images(16), eval_dataset=images(8, seed=1))
    torch.manual_seed(7)
    found = first_batch(trainer)
    after = torch.rand(1)
    torch.manual_seed(7)
    expected = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(7)
    assert found.keys() == {"pixel_values", "labels"}
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(after, torch.rand(1))  # no random number was used up


@pytest.mark.parametrize("collator", [None, "two at the least"])
def test_an_image_of_another_size_is_found_behind_the_first_batches(collator: str | None, tmp_path: Path):
    """Evaluation goes through its data in order; of a collator that takes no single item, nothing is known."""
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0, "name": "a"} for _ in range(64)]
    rows[56] = {"pixel_values": torch.zeros(3, 48, 40), "labels": 0, "name": "b"}
    trainer = plain(tmp_path, eval_dataset=rows)
    if collator:
        trainer.data_collator = lambda rows: {"pixel_values": torch.stack([rows[k]["pixel_values"] for k in (0, 1)])}
    state = torch.get_rng_state()
    found = batches_of_another_size(trainer, {"pixel_values": torch.zeros(8, 3, 32, 32)})
    assert [tuple(batch["pixel_values"].shape) for batch in found] == ([] if collator else [(1, 3, 48, 40)])
    assert all(batch.keys() == {"pixel_values", "labels"} for batch in found)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_train_set_it_comes_from_the_first_evaluation_set(tmp_path: Path):
    trainer = plain(tmp_path, eval_dataset={"one": images(8, seed=1), "two": images(8, seed=2)})
    assert torch.equal(first_batch(trainer)["pixel_values"], images(8, seed=1)["pixel_values"][:])


def test_without_data_there_is_none(tmp_path: Path):
    assert first_batch(plain(tmp_path)) is None and first(tmp_path, 3) == []


@pytest.mark.parametrize(("count", "sizes"), [(1, [4]), (4, [4]), (5, [4, 4]), (100, [4, 4, 2])])
def test_at_least_so_many_inputs_are_read_or_all_there_are(tmp_path: Path, count: int, sizes: list[int]):
    batches = first(tmp_path, count, train_dataset=images(10))
    assert [len(batch["pixel_values"]) for batch in batches] == sizes
    assert all(batch.keys() == {"pixel_values"} for batch in batches)


@pytest.mark.parametrize(("images_too", "count"), [(True, 2), (False, 8)])
def test_a_number_for_the_whole_batch_counts_no_images(images_too: bool, count: int, tmp_path: Path):
    """Where there is nothing else, a batch counts as one."""

    def collate(rows: list[dict]) -> dict:
        batch = {"temperature": torch.tensor(2.0)}
        return {**batch, "pixel_values": torch.stack([row["pixel_values"] for row in rows])} if images_too else batch

    trainer = plain(tmp_path, train_dataset=images(32))
    trainer.data_collator = collate
    assert len(first_inputs(trainer, trainer.model, 8)) == count


def test_labels_are_those_of_the_arguments_and_those_of_vision_models(tmp_path: Path):
    trainer = plain(tmp_path, label_names=["category"])
    batch = {"pixel_values": 1, "category": 2, "labels": 3, "class_labels": 4, "mask": 5}
    assert without_labels(trainer, batch) == {"pixel_values": 1, "mask": 5}


def prepares(base: type[Trainer]) -> type[Trainer]:
    class Mine(base):
        def _prepare_inputs(self, inputs):
            return {**super()._prepare_inputs(inputs), "pixel_values": inputs["pixel_values"] / 4 - 2}

    return Mine


def steps(base: type[Trainer]) -> type[Trainer]:
    class Mine(base):
        def training_step(self, model, inputs, *args, **kwargs):
            inputs["pixel_values"] = inputs["pixel_values"] / 4 - 2
            return super().training_step(model, inputs, *args, **kwargs)

    return Mine


def computes(base: type[Trainer]) -> type[Trainer]:
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["pixel_values"] / 4 - 2)
            loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    return Mine


WAYS = [prepares, steps, computes]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_inputs_are_what_the_model_gets_in_training(tmp_path: Path, way: Callable[[type[Trainer]], type[Trainer]]):
    trainer = way(Trainer)(resnet(), arguments(tmp_path), train_dataset=images(8))
    trainer.model.resnet.embedder.train()
    trainer.model.classifier.eval()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batches = list(trainer.get_train_dataloader())
    found = list(inputs_of(trainer, trainer.model, batches))
    assert [batch.keys() for batch in found] == [{"pixel_values"}] * 2
    torch.testing.assert_close([b["pixel_values"] for b in found], [b["pixel_values"] / 4 - 2 for b in batches])
    assert trainer.model.resnet.embedder.training and not trainer.model.classifier.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_step_that_never_calls_the_model_is_refused(tmp_path: Path):
    class Mine(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = model.forward(**inputs).loss
            loss.backward()
            return loss.detach()

    trainer = Mine(resnet(), arguments(tmp_path), train_dataset=images(4))
    with pytest.raises(CalibrationError, match="never calls the model"):
        list(inputs_of(trainer, trainer.model, trainer.get_train_dataloader()))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ranges_are_those_of_what_the_model_gets(tmp_path: Path, way: Callable[[type[Trainer]], type[Trainer]]):
    """Pixels of 0 to 255 that are normalised on the device: an input of -2 to 61.75 has a scale of 0.25."""
    rows = [{"pixel_values": torch.linspace(0, 255, 3 * 32 * 32).view(3, 32, 32), "labels": k % 4} for k in range(8)]
    config = recipe(activations={"observer": "minmax", "learned": False})
    trainer = way(QATTrainer)(resnet(), arguments(tmp_path), train_dataset=rows, qat_config=config)
    trainer.calibrate()
    scale = fake_quantizers(trainer.model)["resnet.pixel_values_quantizer"].scale
    assert scale.item() == pytest.approx(0.25, rel=1e-4)


def test_an_attribute_that_is_set_after_the_constructor_may_be_missing_in_it(tmp_path: Path):
    class Mine(QATTrainer):
        def __init__(self, *args, divisor: float, **kwargs):
            super().__init__(*args, **kwargs)
            self.divisor = divisor

        def _prepare_inputs(self, inputs):
            return {**super()._prepare_inputs(inputs), "pixel_values": inputs["pixel_values"] / self.divisor}

    trainer = Mine(resnet(), arguments(tmp_path), train_dataset=images(16), divisor=2.0)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_a_detector_that_makes_queries_of_its_labels_trains(tmp_path: Path):
    """One graph for each call of its parts is there before the optimizer, whatever the first batch shows."""
    rows = [{"pixel_values": torch.randn(6, 8), "labels": boxes(k % 4)[0]} for k in range(8)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([x["pixel_values"] for x in batch]),
            "labels": [x["labels"] for x in batch],
        }

    trainer = QATTrainer(MoreQueries(), arguments(tmp_path), train_dataset=rows, data_collator=collate)
    names = [name for name, _ in trainer.model.named_parameters()]
    trainer.train()
    assert trainer.state.global_step > 0
    assert [name for name, _ in trainer.model.named_parameters()] == names
