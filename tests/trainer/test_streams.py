from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_qat.trainer.streams import ReadOnce
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.training import arguments, recipe


class Numbered(IterableDataset):
    """Samples whose label is their number, and whose image is noise."""

    def __init__(self, count: int, once: bool) -> None:
        self.name = "numbered"
        self.count, self.source = count, self.samples(count) if once else None

    def samples(self, count: int) -> Iterator[dict[str, Any]]:
        for k in range(count):
            yield {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(k)), "labels": k % 5}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.samples(self.count) if self.source is None else self.source


class ReturnsItself(Numbered):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.source


def trained_on(kind: type[Trainer], directory: Path, stream: IterableDataset, steps: int) -> tuple[int, list[float]]:
    """How many steps there were, and the first pixel of every image that training has seen, in order."""
    seen: list[float] = []

    class Mine(kind):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step or self.trains:
                seen.extend(inputs["pixel_values"][:, 0, 0, 0].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

        trains = False

    class Begins(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.trains = True

    recipe_of_ours = {"qat_config": recipe()} if issubclass(kind, QATTrainer) else {}
    args = arguments(directory, max_steps=steps)
    trainer = Mine(resnet(), args, train_dataset=stream, callbacks=[Begins()], **recipe_of_ours)
    trainer.train()
    return trainer.state.global_step, seen


@pytest.mark.parametrize("make", [Numbered, pytest.param(ReturnsItself, marks=pytest.mark.slow)])
def test_of_a_stream_that_can_be_read_once_training_sees_every_sample_once(tmp_path: Path, make: type[Numbered]):
    expected = trained_on(Trainer, tmp_path / "plain", make(22, once=True), 6)
    assert expected == (6, [sample["pixel_values"][0, 0, 0].item() for sample in Numbered(22, once=False)])
    assert trained_on(QATTrainer, tmp_path / "ours", make(22, once=True), 6) == expected


def test_a_stream_that_begins_anew_is_left_alone(tmp_path: Path):
    stream = Numbered(12, once=False)
    trainer = QATTrainer(resnet(), arguments(tmp_path, max_steps=2), train_dataset=stream)
    assert trainer.train_dataset is stream


def test_the_attributes_are_those_of_the_stream_and_a_look_keeps_what_it_reads():
    source = Numbered(5, once=True)
    stream = ReadOnce(source, [], [iter(source)])
    assert stream.name == "numbered" and stream.count == 5
    look = iter(stream)
    first = [next(look)["labels"], next(look)["labels"]]
    assert first == [0, 1] and [sample["labels"] for sample, _ in zip(stream, range(3), strict=False)] == [0, 1, 2]
    stream.trains = True
    assert [sample["labels"] for sample in stream] == [0, 1, 2, 3, 4]
    assert list(stream) == []
