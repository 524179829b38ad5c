from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_qat.trainer.batches import first_batch, first_inputs, inputs_of, without_labels
from tests.models import resnet
from tests.training import arguments, images


def plain(directory: Path, **changes: object) -> Trainer:
    """A trainer of transformers, with batches of 4 to train and 8 to evaluate."""
    data = {name: changes.pop(name, None) for name in ("train_dataset", "eval_dataset")}
    return Trainer(resnet(), arguments(directory, **changes), **data)


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


def test_without_a_train_set_it_comes_from_the_first_evaluation_set(tmp_path: Path):
    trainer = plain(tmp_path, eval_dataset={"one": images(8, seed=1), "two": images(8, seed=2)})
    assert torch.equal(first_batch(trainer)["pixel_values"], images(8, seed=1)["pixel_values"][:])


def test_without_data_there_is_none(tmp_path: Path):
    assert first_batch(plain(tmp_path)) is None and first_inputs(plain(tmp_path), 3) == []


@pytest.mark.parametrize(("count", "sizes"), [(1, [4]), (4, [4]), (5, [4, 4]), (100, [4, 4, 2])])
def test_at_least_so_many_inputs_are_read_or_all_there_are(tmp_path: Path, count: int, sizes: list[int]):
    batches = first_inputs(plain(tmp_path, train_dataset=images(10)), count)
    assert [len(batch["pixel_values"]) for batch in batches] == sizes
    assert all(batch.keys() == {"pixel_values"} for batch in batches)


def test_labels_are_those_of_the_arguments_and_those_of_vision_models(tmp_path: Path):
    trainer = plain(tmp_path, label_names=["category"])
    batch = {"pixel_values": 1, "category": 2, "labels": 3, "class_labels": 4, "mask": 5}
    assert without_labels(trainer, batch) == {"pixel_values": 1, "mask": 5}
    loader = DataLoader([batch, batch], batch_size=None)
    assert list(inputs_of(trainer, loader)) == [{"pixel_values": 1, "mask": 5}] * 2
