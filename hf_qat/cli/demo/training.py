"""The float part of the demo: a small MobileNetV2, and its training with the plain `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import (
    EvalPrediction,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_qat.cli.demo.digits import IMAGE_SIZE, LABELS, Task


LEARNING_RATE = 1e-2

#: Rate × decay, summed over all steps, comes to 3: a weight that is of no use fades away. So it does in long trainings
#: on ImageNet, after which the channels of a MobileNetV2 differ a hundredfold; that is what a single scale per tensor
#: suffers from, and half a minute with the usual decay would not show it.
WEIGHT_DECAY = 1.5


class TrainingBar(TrainerCallback):
    """A single bar, and on a terminal only, in place of the Trainer's own output."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw it."""
        self.bar = tqdm(total=state.max_steps, desc=f"{self.name}: training", leave=False, disable=None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step further."""
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wipe it away."""
        self.bar.close()


def use_bar(trainer: Trainer, name: str) -> None:
    """Exchange the Trainer's own output for a `TrainingBar`."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingBar(name))


def make_model(seed: int) -> MobileNetV2ForImageClassification:
    """A MobileNetV2 of a third of the usual width, 0.3 million parameters, with random weights drawn by `seed`."""
    config = MobileNetV2Config(
        image_size=IMAGE_SIZE,
        depth_multiplier=0.35,
        finegrained_output=False,
        classifier_dropout_prob=0.2,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MobileNetV2ForImageClassification(config)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Percentage of rows of `logits`, (N, classes), that are largest at their label, (N,)."""
    return 100 * float((logits.argmax(axis=-1) == labels).mean())


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`eval_accuracy` of `Trainer.evaluate`, in percent."""
    return {"accuracy": accuracy(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))}


def arguments(output: Path, seed: int, epochs: int, learning_rate: float, **more: Any) -> TrainingArguments:
    """What all trainings of the demo have in common, and `more`."""
    return TrainingArguments(
        str(output),
        seed=seed,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        remove_unused_columns=False,  # the images become `pixel_values` only when a batch is read
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def train_float(task: Task, output: Path, seed: int, epochs: int) -> tuple[MobileNetV2ForImageClassification, float]:
    """Train a float model.

    Returns:
        The model, in evaluation mode, and its accuracy on the test set in percent.
    """
    model = make_model(seed)
    trainer = Trainer(
        model=model,
        args=arguments(output, seed, epochs, LEARNING_RATE, weight_decay=WEIGHT_DECAY, warmup_steps=0.05),
        train_dataset=task.train,
        eval_dataset=task.test,
        compute_metrics=compute_metrics,
    )
    use_bar(trainer, "float")
    trainer.train()
    return model.eval(), trainer.evaluate()["eval_accuracy"]
