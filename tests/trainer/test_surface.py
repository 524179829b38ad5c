"""Hook or argument of Trainer → tried how → the same as Trainer: what users' own scripts do, run with both classes.

Each row of `SURFACE` is run with `Trainer` and with `QATTrainer`; what it returns must be the same. What cannot be the
same bit for bit (losses, as weights are rounded) is not returned, but asserted in a test of its own below.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler, default_collate
from transformers import ResNetConfig, ResNetModel, Trainer, ViTConfig, ViTForMaskedImageModeling

from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet, vit
from tests.training import arguments, recipe


Row = Callable[[type[Trainer], Path], object]


def rows(count: int = 8, label: str = "labels") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), label: k % 4} for k in range(count)]


class OwnNames(nn.Module):
    """A classifier that calls its labels `category`."""

    def __init__(self) -> None:
        super().__init__()
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
        self.body, self.head = ResNetModel(config), nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor, category: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(pixel_values).pooler_output.flatten(1))
        if category is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, category), "logits": logits}


class LabelsRequired(nn.Module):
    """A classifier that cannot be called without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.net(pixel_values))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(trainer: Trainer) -> int:
    """How many steps a training makes."""
    trainer.train()
    return trainer.state.global_step


def label_names(kind: type[Trainer], directory: Path) -> object:
    args = arguments(directory, max_steps=2, label_names=["category"])
    trainer = kind(OwnNames(), args, train_dataset=rows(8, "category"), eval_dataset=rows(4, "category"))
    return trained(trainer), sorted(trainer.evaluate())


def labels_required(kind: type[Trainer], directory: Path) -> object:
    args = arguments(directory, max_steps=2)
    trainer = kind(LabelsRequired(), args, train_dataset=rows(), eval_dataset=rows(4))
    return trained(trainer), trainer.predict(rows(4)).predictions.shape


class Wrapped(nn.Module):
    """What of its signature tells nothing of the names of labels."""

    def __init__(self) -> None:
        super().__init__()
        self.base = vit()

    def forward(self, **kwargs: Any) -> Any:
        return self.base(**kwargs)


def names_of_no_argument(kind: type[Trainer], directory: Path) -> object:
    args = arguments(directory, max_steps=2, label_names=["labels"], remove_unused_columns=False)
    return trained(kind(Wrapped(), args, train_dataset=rows()))


def no_data_in_the_constructor(kind: type[Trainer], directory: Path) -> object:
    return sorted(kind(resnet(), arguments(directory)).evaluate(rows(4)))


def attributes_after_the_constructor(kind: type[Trainer], directory: Path) -> object:
    class Balanced(kind):
        def __init__(self, *args: Any, weights: list[float], **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.weights = weights

        def _get_train_sampler(self, dataset: Any = None) -> WeightedRandomSampler:
            return WeightedRandomSampler(self.weights, len(self.weights))

    return trained(Balanced(resnet(), arguments(directory, max_steps=2), train_dataset=rows(), weights=[1.0] * 8))


def a_loader_of_ones_own(kind: type[Trainer], directory: Path) -> object:
    class Mine(kind):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(rows(), batch_size=4, collate_fn=self.data_collator)

    trainer = Mine(resnet(), arguments(directory, max_steps=2))
    return trained(trainer), sorted(trainer.evaluate(rows(4)))


def images_of_several_sizes(kind: type[Trainer], directory: Path) -> object:
    generator, sizes = random.Random(0), []

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        size = generator.choice([32, 48])
        sizes.append(size)
        pixels = torch.stack([row["pixel_values"] for row in batch])
        pixels = nn.functional.interpolate(pixels, size=(size, size))
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in batch])}

    args = arguments(directory, max_steps=6)
    steps = trained(kind(resnet(), args, train_dataset=rows(16), data_collator=collate, eval_dataset=rows(4)))
    return steps, set(sizes)


def a_loss_of_ones_own(kind: type[Trainer], directory: Path) -> object:
    calls: list[object] = []

    class Mine(kind):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, return_outputs, **kwargs)
            calls.append(int(kwargs["num_items_in_batch"]) if model.training else None)
            self.log({"mine": 1.0})
            return result

    args = arguments(directory, max_steps=2, gradient_accumulation_steps=2)
    trainer = Mine(vit(), args, train_dataset=rows(16))
    trained(trainer)
    return calls, sum("mine" in entry for entry in trainer.state.log_history)


def a_loss_function(kind: type[Trainer], directory: Path) -> object:
    calls: list[int] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(int(num_items_in_batch))
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = arguments(directory, max_steps=2, gradient_accumulation_steps=2)
    trained(kind(resnet(), args, train_dataset=rows(16), compute_loss_func=loss))
    return calls


def pairs_instead_of_dictionaries(kind: type[Trainer], directory: Path) -> object:
    class Mine(kind):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            pixels, labels = inputs
            outputs = model(pixels)
            loss = nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss, outputs.logits, inputs[1]

    data = [(row["pixel_values"], row["labels"]) for row in rows(16)]
    args = arguments(directory, max_steps=2, gradient_accumulation_steps=2)
    trainer = Mine(resnet(), args, train_dataset=data, eval_dataset=data, data_collator=default_collate)
    return trained(trainer), sorted(trainer.evaluate()), trainer.predict(data).predictions.shape


def set_after_the_constructor(kind: type[Trainer], directory: Path) -> object:
    """A further label, whose column `remove_unused_columns` then keeps, and another evaluation set."""
    seen: list[bool] = []

    class Weighted(kind):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.is_in_train:
                seen.append(inputs.pop("weight", None) is not None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    data = datasets.Dataset.from_list([{**row, "weight": 1.0} for row in rows()]).with_format("torch")
    trainer = Weighted(
        resnet(), arguments(directory, max_steps=2, **workers), train_dataset=data, eval_dataset=rows(4)
    )
    trainer.eval_dataset, trainer.label_names = rows(6), ["labels", "weight"]
    steps = trained(trainer)
    return steps, set(seen), sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader())


def methods_of_one_trainer(kind: type[Trainer], directory: Path) -> object:
    """They are set as attributes, after the constructor, as notebooks do."""
    logged: list[list[str]] = []
    losses: list[Tensor] = []
    trainer = kind(resnet(), arguments(directory, max_steps=3, gradient_accumulation_steps=2))

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        losses.append(outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer.compute_loss = compute_loss
    trainer.log = lambda logs, *args, **kwargs: logged.append(sorted(logs))
    trainer.get_train_dataloader = lambda: DataLoader(rows(24), batch_size=4, collate_fn=trainer.data_collator)
    return trained(trainer), logged, len(losses), trainer.compute_loss is compute_loss


class Stream(IterableDataset):
    """Rows of unknown number."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from rows()


def a_stream(kind: type[Trainer], directory: Path) -> object:
    return trained(kind(resnet(), arguments(directory, max_steps=3), train_dataset=Stream()))


#: What is tried → how. Positional arguments, hooks of batches, evaluation before training and the card have tests of
#: their own: `test_trainer.py`, `test_batches.py`, `test_results.py`.
SURFACE: dict[str, Row] = {
    "label_names of the arguments": label_names,
    "forward requires labels": labels_required,
    "forward takes **kwargs": names_of_no_argument,
    "no data set in the constructor": no_data_in_the_constructor,
    "attributes set after super().__init__()": attributes_after_the_constructor,
    "get_train_dataloader of one's own, and no data set": a_loader_of_ones_own,
    "images of several sizes": images_of_several_sizes,
    "compute_loss, and log inside it": a_loss_of_ones_own,
    "compute_loss_func": a_loss_function,
    "a stream as the train set": a_stream,
    "batches that are no dictionaries": pairs_instead_of_dictionaries,
    "methods given to one trainer": methods_of_one_trainer,
    "label_names and eval_dataset set after the constructor": set_after_the_constructor,
}


#: Rows that rarely matter, or have another test in every run: in `test_batches.py`, `test_subclassing.py`,
#: `test_streams.py`, and below.
SLOW = (
    "attributes set after super().__init__()",
    "batches that are no dictionaries",
    "label_names and eval_dataset set after the constructor",
    "compute_loss, and log inside it",
    "images of several sizes",
    "methods given to one trainer",
    "forward takes **kwargs",
    "a stream as the train set",
)


@pytest.mark.parametrize("row", [pytest.param(r, marks=[pytest.mark.slow] if r in SLOW else []) for r in SURFACE])
def test_what_is_tried_gives_the_same_as_with_trainer(tmp_path: Path, row: str):
    plain, ours = (SURFACE[row](kind, tmp_path / kind.__name__) for kind in (Trainer, QATTrainer))
    assert ours == plain


@pytest.mark.slow
def test_the_loss_of_masked_image_modelling_is_not_quantized(tmp_path: Path):
    """It takes no labels, so that nothing but its output tells that it is a loss."""
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        encoder_stride=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model, x = ViTForMaskedImageModeling(config), torch.randn(8, 3, 32, 32)
    mask = (torch.rand(8, 16) < 0.6).long()
    data = [{"pixel_values": pixels, "bool_masked_pos": masked} for pixels, masked in zip(x, mask, strict=True)]
    trainer = QATTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=data, qat_config=recipe())
    trainer.train()
    output = model.eval()(x, bool_masked_pos=mask)
    hidden = mask.view(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    by_hand = ((x - output.reconstruction).abs() * hidden).sum() / (hidden.sum() * 3)
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert any(path.startswith("decoder") for path in fake_quantizers(model))


def test_with_quantizers_off_images_of_another_size_are_computed_as_by_the_float_model(tmp_path: Path):
    model = resnet().eval()
    sizes = {size: torch.randn(2, 3, size, size) for size in (32, 48, 64)}
    expected = {size: model(pixels).logits for size, pixels in sizes.items()}

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        size = (32, 48)[int(batch[0]["labels"]) // 2]
        pixels = torch.stack([row["pixel_values"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        return {"pixel_values": nn.functional.interpolate(pixels, size=(size, size)), "labels": labels}

    data = sorted(rows(16), key=lambda row: row["labels"])
    QATTrainer(model, arguments(tmp_path), train_dataset=data, data_collator=collate)
    with fake_quant_disabled(model), torch.no_grad():
        for size, pixels in sizes.items():
            torch.testing.assert_close(model.eval()(pixels).logits, expected[size], atol=1e-4, rtol=1e-4)


def test_a_frozen_backbone_stays_as_it_was_and_needs_no_gradient(tmp_path: Path):
    model = resnet()
    model.resnet.requires_grad_(False)
    trainer = QATTrainer(model, arguments(tmp_path, max_steps=3, learning_rate=1e-2), train_dataset=rows())
    trainer.calibrate()
    before = {name: value.clone() for name, value in model.resnet.state_dict().items()}
    trainer.train()
    after = model.resnet.state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    features = model.train().resnet(torch.randn(4, 3, 32, 32), return_dict=True).pooler_output
    assert not features.requires_grad
