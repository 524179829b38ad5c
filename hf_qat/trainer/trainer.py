"""`QATTrainer`: the Trainer that users of transformers know, for quantization-aware training.

A subclass that adds to the hooks of `transformers.Trainer` and copies none of its loop.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CalibrationError
from hf_qat.model.calibration import calibrate
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state import require_stage, state_of
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.callbacks import CalibrationCallback, ScheduleCallback, needs_calibration
from hf_qat.trainer.checks import (
    check_arguments,
    check_distribution,
    check_loaded,
    check_model,
    check_teacher,
    check_train_set,
)
from hf_qat.trainer.distillation import Distillation
from hf_qat.trainer.distributed import ManyProcesses
from hf_qat.trainer.optimizer import count_missing, scale_parameters, separate
from hf_qat.trainer.publishing import Publisher
from hf_qat.trainer.pushing import BackgroundPush
from hf_qat.trainer.random_state import random_state_kept
from hf_qat.trainer.saving import AtomicSaving


logger = logging.get_logger(__name__)


class QATTrainer(Publisher, AtomicSaving, BackgroundPush, ManyProcesses):
    """A `transformers.Trainer` that makes a model ready for int8: exchange the class, keep the rest of the script.

    It prepares the model in place, calibrates it before the first step (batches of the train set; the order in which
    training then sees the data stays what it would have been), freezes batch norm and ranges on schedule, keeps scales
    out of weight decay, and saves checkpoints that are whole and resume bit for bit. It logs what
    `ScheduleCallback.metrics` describes. Calibration alone is often enough: call `calibrate()` and `evaluate()` first.

    Learning rate: start from the one that trained the float model. Texas Instruments advises a hundredth of it; in our
    measurements a twentieth was better at 8 bits, and a fifth to two fifths at 4 bits. One to three epochs, a cosine
    or linear schedule.

    Args:
        model: a float model with float32 weights, or one that `prepare_qat` has prepared, calibrated or not. With
            `model_init` instead, every `train()` prepares and calibrates a new one.
        args: as for Trainer.
        qat_config: the recipe; `QATConfig()` if left out, or that of the prepared model.
        teacher: a float model to learn from beside the labels (`distillation_weight` and `distillation_temperature` of
            the config), or `"float"` for a copy of `model` as it is given; for models whose `logits` are scores of
            classes. It moves to the training device; it is neither trained nor saved. Losses of `evaluate()` are the
            task's alone.
        trainer_arguments: everything else that Trainer takes, by keyword. A train set is read for the shape of the
            images; a one-pass stream loses that batch, and those of calibration.

    Raises:
        ConfigError: arguments or a teacher that cannot be honoured.
        StageError: a converted model, or `qat_config` for a model that was prepared by another one.
        WeightsError: weights in half precision.
        CaptureError: forward cannot become a graph.

    Examples:
        trainer = QATTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        trainer.calibrate()
        print(trainer.evaluate())  # what calibration alone gives
        trainer.train()
        trainer.export("digits-int8")  # or trainer.push_to_hub()
    """

    model: nn.Module  # from the constructor on, never None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        qat_config: QATConfig | None = None,
        teacher: nn.Module | Literal["float"] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args  # Trainer's own default
        check_arguments(args)
        if model is not None:
            check_model(model, qat_config)
        check_teacher(teacher, model)
        check_train_set(trainer_arguments.get("train_dataset"))
        self._qat_config = qat_config
        self._teacher = teacher
        super().__init__(model, args, **trainer_arguments)
        check_distribution(self)
        self.distillation: Distillation | None = None
        self._prepare_model(self.model)
        self.add_callback(CalibrationCallback(self.calibrate))
        self.add_callback(ScheduleCallback)

    def calibrate(self, dataset: Dataset | None = None) -> None:
        """Find the scales from data, without training; `evaluate()` then tells what that gives.

        `train()` does so by itself where it has not been done. It draws no random numbers of the training's.

        Args:
            dataset: the train set if left out, shuffled; another one is read in its order. `calibration_batches` of
                the config says how much of it.

        Raises:
            CalibrationError: no data, or integers, NaN or infinities in it.
            StageError: the model is not prepared.
        """
        config = require_stage(self.model, "prepared", "calibrate").config
        if dataset is None and self.train_dataset is None:
            raise CalibrationError("no train set to calibrate from: pass train_dataset=, or call calibrate(dataset).")
        with random_state_kept(self.args.device):
            loader = self.get_train_dataloader() if dataset is None else self.get_test_dataloader(dataset)
            calibrate(self.model, self._inputs_of(loader), config.calibration_batches, config.bias_correction)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; for `train()` also prepared."""
        model = super().call_model_init(trial)
        if getattr(self, "is_in_train", False):  # the constructor prepares its own when it is done
            self._prepare_model(model)
        return model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, without scales and offsets: nothing says that a log2 scale should be near 0."""
        quantizers = tuple(f"{path}." for path in fake_quantizers(model))
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(quantizers)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, with scales and offsets in a group of their own, at `scale_lr_multiplier` times the rate.

        An optimizer that the user gave is left alone.
        """
        if self.is_fsdp_enabled and self.state.global_step == 0 and needs_calibration(self.model):
            self.calibrate()  # not when training begins: the weights are split by then
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        scales = scale_parameters(self.model)
        if not given:
            separate(optimizer, scales, self._recipe().scale_lr_multiplier)
        elif absent := count_missing(optimizer, scales):
            logger.warning(
                f"The optimizer that was passed in lacks {absent} of the {len(scales)} learned scales and offsets of "
                "the model, which therefore stay as calibrated. Make it after prepare_qat(model, config), or leave it "
                "to QATTrainer."
            )
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; in training with a teacher, (1 - w) · loss + w · `distillation_loss`.

        Raises:
            ConfigError: a model gives no logits of classes.
        """
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        images = self._without_labels(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with self.accelerator.autocast():
            distance = self.distillation.loss(self.model, outputs, images)
        if self._loss_is_scaled(num_items_in_batch):
            # `loss` is this batch's part of the mean over all accumulated ones, and `distance` a mean over the batch.
            distance = distance / self.current_gradient_accumulation_steps
        weight = self._recipe().distillation_weight
        loss = (1 - weight) * loss + weight * distance
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; the training loss comes with metrics of quantization and the mean `qat_distillation_loss`."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ScheduleCallback):
                    logs.update(callback.metrics(self.model))
            if self.distillation is not None:
                logs["qat_distillation_loss"] = self.distillation.mean_loss()
        super().log(logs, start_time)

    def _recipe(self) -> QATConfig:
        return require_stage(self.model, "prepared", "train").config

    def _prepare_model(self, model: nn.Module) -> None:
        """Prepare `model` in place if it is not yet, and set the teacher."""
        check_model(model, self._qat_config)
        self.reset_record(model)
        batch = self._example_batch()
        self.synchronize_initial_model(model, batch)
        inputs = None if batch is None else self._without_labels(batch)
        teacher = copy.deepcopy(model) if self._teacher == "float" else self._teacher
        if state_of(model) is None:
            with random_state_kept(self.args.device):
                prepare_qat(model, self._qat_config, inputs)
        if isinstance(teacher, nn.Module):
            temperature = require_stage(model, "prepared", "train").config.distillation_temperature
            self.distillation = Distillation(teacher, temperature, self.args.device)
            if inputs is not None:
                self.distillation.check(model, inputs)

    def _example_batch(self) -> dict[str, Any] | None:
        """The first one of the data: the config of many models does not know the size of the images."""
        with random_state_kept(self.args.device):
            loader = self._any_loader()
            return None if loader is None else next(iter(loader), None)

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether `training_step` takes the loss as it is; else it divides by the number of accumulated batches."""
        stated: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # newer than our oldest transformers
        if stated is not None:
            return stated
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Instead of warnings: raises `WeightsError` for a checkpoint that leaves a part of the model unfilled."""
        check_loaded(self.model, load_result.missing_keys, load_result.unexpected_keys)
