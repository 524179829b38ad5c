"""How all nets of the table are trained and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.benchmarks.accuracy.nets import Net
from tests.benchmarks.accuracy.textures import CLASSES, SIDE, Images, normalized, turned


@dataclass(frozen=True)
class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images as a net takes them; a batch is put together at once, which is why nothing is left to collate.

    Attributes:
        dense: the labels are maps.
        turns: each image is turned and mirrored at random (torch's generator) whenever it is read.
    """

    images: Images
    dense: bool
    turns: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What `torch.utils.data` reads a batch by."""
        chosen = torch.as_tensor(rows)
        pixels = self.images.pixels[chosen]
        labels = self.images.masks[chosen] if self.dense else self.images.labels[chosen]
        if self.turns:
            turns = torch.randint(8, (len(rows),))
            pixels, labels = turned(pixels, turns), turned(labels, turns) if self.dense else labels
        return {"pixel_values": normalized(pixels), "labels": labels.long()}


def as_read(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collates batches that `Rows` has put together."""
    return batch


def arguments(
    directory: str, net: Net, seed: int, learning_rate: float, epochs: float, device: str, **more: Any
) -> TrainingArguments:
    """What all trainings have in common, and `more`."""
    return TrainingArguments(
        directory,
        seed=seed,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=net.batch,
        per_device_eval_batch_size=100,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the GPU at every step
        report_to=[],
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **more,
    )


class TaughtTrainer(Trainer):
    """Trainer with half of its loss the distance to what a teacher answers (Hinton et al. 2015, T = 1)."""

    teacher: nn.Module

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **more: Any
    ) -> Any:
        """The loss, and what the model answered."""
        outputs = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(pixel_values=inputs["pixel_values"]).logits.softmax(-1)
        loss = 0.5 * outputs.loss + 0.5 * nn.functional.cross_entropy(outputs.logits, taught)
        return (loss, outputs) if return_outputs else loss


def train_float(
    net: Net, train: Images, directory: str, seed: int, teacher: nn.Module | None, device: str
) -> nn.Module:
    """A net from scratch, in evaluation mode."""
    torch.manual_seed(seed)
    model = net.make().to(memory_format=torch.channels_last)  # of a CNN, in two thirds of the time
    options = arguments(
        directory,
        net,
        seed,
        net.learning_rate,
        net.epochs,
        device,
        warmup_steps=net.warmup,
        weight_decay=0.05,
        max_grad_norm=1.0,
    )
    kind = Trainer if teacher is None else TaughtTrainer
    trainer = kind(model, options, data_collator=as_read, train_dataset=Rows(train, net.dense, turns=True))
    if teacher is not None:
        trainer.teacher = teacher.eval().to(device)
    trainer.train()
    return model.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def answers(model: nn.Module, images: Images, device: str) -> Iterator[Tensor]:
    """Logits, batch by batch, on the CPU."""
    model.to(device)
    for pixels in images.pixels.split(100):
        yield model(pixel_values=normalized(pixels).to(device)).logits.cpu()


def points(logits: Sequence[Tensor] | Tensor, images: Images, dense: bool) -> float:
    """Points of 100: top-1 of a classifier; mean intersection over union of a map of logits, over
    the classes that are there or were found.

    Args:
        logits: (N, classes), or (N, classes, H, W) at a fraction of the images' size, or batches of them.
    """
    scores = logits if isinstance(logits, Tensor) else torch.cat(list(logits))
    if not dense:
        return 100 * float((scores.argmax(-1) == images.labels).double().mean())
    larger = nn.functional.interpolate(scores, (SIDE, SIDE), mode="bilinear")
    count = len(CLASSES) + 1
    pairs = (images.masks.long() * count + larger.argmax(1)).flatten().bincount(minlength=count**2).view(count, count)
    both = pairs.diagonal().double()
    either = pairs.sum(0) + pairs.sum(1) - both
    return 100 * float((both / either)[either > 0].mean())
