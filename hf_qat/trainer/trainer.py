"""`QATTrainer`: the Trainer that users of transformers know, for quantization-aware training.

A subclass that adds to the hooks of `transformers.Trainer` and copies none of its loop. The hooks stand in the order
of a run; what they add is in the other files of this room, and those around a checkpoint are in `saving.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CalibrationError, ConfigError
from hf_qat.export.verify import require_onnxruntime
from hf_qat.files.atomic import put_back, whole_file
from hf_qat.files.only_writer import only_writer
from hf_qat.graph.progress import bars_hidden
from hf_qat.model.calibration import calibrate
from hf_qat.model.parameter_groups import scale_parameters
from hf_qat.model.state import require_stage
from hf_qat.model.untrained import untrained_batch_norms
from hf_qat.publish.accuracy import given_accuracy
from hf_qat.publish.card import CardFacts, CardOptions, render
from hf_qat.publish.directory import CARD, save_model
from hf_qat.publish.hub import make_repository, push_directory
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer import checks, distributed, preparing, publishing
from hf_qat.trainer.bad_steps import BadSteps, statistics_kept_if_bad
from hf_qat.trainer.batches import (
    first_inputs,
    has_train_data,
    inputs_of,
    is_overridden,
    of_first_size,
    unnoticed,
    without_labels,
)
from hf_qat.trainer.callbacks import CalibrationCallback, ScheduleCallback, metrics_of_schedule, needs_calibration
from hf_qat.trainer.ddp import average_gradients, scales_in_training
from hf_qat.trainer.distillation import Distillation, loss_is_scaled
from hf_qat.trainer.loss_scale import scaled_as_it_turns_out
from hf_qat.trainer.measuring import Record, evaluation_images, reset_record
from hf_qat.trainer.mixed_precision import forget_mixed_precision
from hf_qat.trainer.optimizer import count_missing, move_scales_to_own_group
from hf_qat.trainer.pushing import BackgroundPush
from hf_qat.trainer.saving import CheckpointingTrainer
from hf_qat.trainer.streams import keep_what_is_looked_at
from hf_qat.trainer.suspicions import ImageStatistics
from hf_qat.trainer.training_facts import schedule_of


logger = logging.get_logger(__name__)


class QATTrainer(CheckpointingTrainer):
    """A `transformers.Trainer` that makes a model ready for int8: exchange the class, keep the rest of the script.

    It prepares the model in place, calibrates it before the first step (batches of the train set; the order in which
    training then sees the data stays what it would have been), freezes batch norm and ranges on schedule, keeps scales
    out of weight decay, and saves checkpoints that are whole and resume bit for bit. It logs what
    `ScheduleCallback.metrics` describes. Calibration alone is often enough: call `calibrate()` and `evaluate()` first.

    Learning rate: start from the one that trained the float model. Texas Instruments advises a hundredth of it; in our
    measurements a twentieth was better at 8 bits, and a tenth to two fifths at 4 bits. One to three epochs, a cosine
    or linear schedule. `hf_qat.read_recipe` has what was measured for each kind of network.

    A subclass overrides the hooks as those of Trainer, and calls `super()` to keep what is added to them:

    | hook | what is added |
    |---|---|
    | `__init__`, `call_model_init` | the model is prepared, and the same in all processes |
    | `train` | before: a checkpoint that was half replaced is put back; after: what failed to be pushed is pushed |
    | `_prepare_for_training` | several processes: loss scaled right, model made ready for DDP, or split for FSDP2 |
    | `create_optimizer`, `get_decay_parameter_names` | scales: no weight decay, a learning rate of their own |
    | `training_step` | a loss of the user's own is scaled right; several processes: gradients of scales are averaged |
    | `_get_grad_norm` | a step with gradients of NaN or infinity is left out; many in a row end the training |
    | `compute_loss` | a teacher's distillation loss; mixed precision of a model that FSDP2 split |
    | `log` | metrics of quantization |
    | `evaluate`, `evaluation_loop` | before: calibrated if need be, ready for FSDP2; after: noted for the card |
    | `_save_checkpoint`, `_get_output_dir`, `_save`, `save_model` | whole or not at all; of FSDP2, gathered |
    | `_load_from_checkpoint`, `_issue_warnings_after_load` | a checkpoint that does not fit is an error |
    | `init_hf_repo`, `_push_from_checkpoint` | patience with the Hub, and errors that are heard of |
    | `create_model_card`, `push_to_hub` | our own card; the exported model instead of the training checkpoint |

    Args:
        model: a float model with float32 weights, or one that `prepare_qat` has prepared, calibrated or not. With
            `model_init` instead, every `train()` prepares and calibrates a new one.
        args: as for Trainer.
        trainer_positional, trainer_arguments: everything else that Trainer takes, in its order or by keyword. A train
            set is read for the shape of the images, and to calibrate; of a stream that can be read once, what was read
            comes first in training. If there is none yet, or a hook cannot run yet, the model is prepared at its
            first use.
        qat_config: the recipe; `QATConfig()` if left out, or that of the prepared model.
        teacher: a float model to learn from beside the labels (`distillation_weight` and `distillation_temperature` of
            the config); `"float"` for a copy of `model` as it is given; or a directory or Hub id, read as one of
            `model`'s class. It teaches classes of images or pixels, labels, numbers, boxes and masks query by query,
            and depths. It moves to the training device; it is neither trained nor saved. Losses of `evaluate()` are
            the task's alone.

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
    hub_model_id: Any
    exported: CardFacts | None = None  # what the latest `export` has measured and written, in the main process

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *trainer_positional: Any,
        qat_config: QATConfig | None = None,
        teacher: nn.Module | str | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args  # Trainer's own default
        checks.check_arguments(args)
        if model is not None:
            checks.check_model(model, qat_config)
        checks.check_teacher(teacher, model)
        self._qat_config, self._teacher = qat_config, teacher
        self._record, self._images = Record(), ImageStatistics()
        self._bad_steps = BadSteps()
        self._examples: preparing.Examples | None = None
        self._constructed = self._waits = self._loss_scale_unknown = False
        self._loss_facts: distributed.LossFacts | None = None
        self.distillation: Distillation | None = None
        self.is_in_train = False  # as Trainer sets it, but before it calls `call_model_init`
        super().__init__(model, args, *trainer_positional, **trainer_arguments)
        checks.check_train_set(self.train_dataset)
        checks.check_distribution(self)
        keep_what_is_looked_at(self)
        if not self.is_fsdp_enabled:
            forget_mixed_precision(self.model)
        self._prepare_model(self.model)
        self._constructed = True
        self.add_callback(CalibrationCallback(self.calibrate))
        self.add_callback(ScheduleCallback)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository on the Hub unless it is there, trying again where trouble may pass.

        Raises:
            PublishError: the Hub refuses, or it is to be private and exists for all to see.
        """
        if not self.is_world_process_zero():
            return
        self.hub_model_id = make_repository(
            self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
        )
        self.push_in_progress = None

    def _prepare_model(self, model: nn.Module, loader: Iterable[Any] | None = None) -> None:
        """Prepare `model` in place if it is not yet; in the constructor it may have to wait for its first use."""
        checks.check_model(model, self._qat_config)
        self.model, self._record, self._loss_facts = model, reset_record(model), None
        if self._constructed:
            self._examples = preparing.examples(self, model, loader)
        else:
            self._examples = preparing.examples_if_ready(self, model, type(self) is not QATTrainer)
        self._waits = not self._constructed and self._examples is None and preparing.can_wait(self, model)
        if not self._waits:
            with self._bars():
                self.distillation = preparing.prepare(self, self._qat_config, self._teacher, self._examples)

    def _bars(self) -> AbstractContextManager[None]:
        """Inside, progress is shown where Trainer shows its own: unless `disable_tqdm`, by one process."""
        return bars_hidden(bool(self.args.disable_tqdm) or not self.is_local_process_zero())

    def _prepare_if_it_waits(self, loader: Iterable[Any] | None = None) -> None:
        if self._waits:
            self._prepare_model(self.model, loader)

    def calibrate(self, dataset: Dataset[Any] | None = None, effort: str | None = None) -> None:
        """Find the scales from data, without training; `evaluate()` then tells what that gives.

        `train()`, `evaluate()` and `predict()` do so by themselves where it has not been done. It draws no random
        numbers of the training's.

        Args:
            dataset: the train set if left out, shuffled; another one is read in its order. `calibration_batches` of
                the config says how much of it.
            effort: `"fast"`, or `"best"`, which takes minutes; see `hf_qat.calibrate`. Else as the config says.

        Raises:
            CalibrationError: no data, or integers, NaN or infinities in it.
            StageError: the model is not prepared.
        """
        if dataset is None and not has_train_data(self):
            raise CalibrationError("no train set to calibrate from: pass train_dataset=, or call calibrate(dataset).")
        with unnoticed(self):
            loader = self.get_train_dataloader() if dataset is None else self.get_test_dataloader(dataset)
            self._prepare_if_it_waits(loader)
            config = require_stage(self.model, Stage.PREPARED, "calibrate").config
            inputs = inputs_of(self, self.model, loader)
            live = untrained_batch_norms(self.model)
            with self._bars():
                calibrate(self.model, inputs, config.calibration_batches, live_batch_norms=live, effort=effort)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, beginning with a calibration where the model needs one.

        Before, a checkpoint that a killed training was about to replace is put back. Afterwards, what could not be
        pushed in the background is pushed again; if that fails too, it is logged as an error: the results of training
        are on the disk and are returned.

        Args:
            args, kwargs: `resume_from_checkpoint` and so on, of Trainer.

        Raises:
            InUseError: another process is training in the same `output_dir`.
            NonFiniteError: the gradients of many steps in a row held NaN or infinity.
        """
        run = str(self.args.output_dir)
        is_trial = len(args) > 1 or kwargs.get("trial") is not None  # of a search: it has a directory of its own in it
        with only_writer(run) if self.args.should_save and not is_trial else nullcontext():
            if self.args.should_save:
                put_back(run)
            self.accelerator.wait_for_everyone()
            self._pushes, self._bad_steps = BackgroundPush(), BadSteps()
            self._record.accuracy.pop("qat", None)
            if self.model_init is None:
                self._prepare_if_it_waits()
            try:
                output = super().train(*args, **kwargs)
            finally:
                self._record.trained |= self.state.global_step > 0
            self._pushes.push_missing(self._destination())
        return output

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new model by `model_init`, and prepare it; the constructor does that itself, when it has the data."""
        model = super().call_model_init(trial)
        if self.is_in_train:
            self._prepare_model(model)
        return model

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> Any:
        """Before the optimizer is made and the model wrapped: see to it that N processes train what one would."""
        if self.is_fsdp_enabled and self.state.global_step == 0 and needs_calibration(self.model):
            self.calibrate()  # not when training begins: the weights are split by then
        own_loss = is_overridden(self, "compute_loss", QATTrainer)
        if self._loss_facts is None or self.args.world_size == 1:  # where batches are accumulated may change
            batch = None if self._examples is None else self._examples.batch
            self._loss_facts = distributed.rehearse(self, self.model, batch, own_loss)
            self._examples = None
        self.model_accepts_loss_kwargs = self._loss_facts.divided
        self._loss_scale_unknown = self._loss_facts.divided and own_loss
        distributed.make_ready_to_wrap(self, self.model, self._loss_facts)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay; no scale or offset: nothing says that a log2 scale should be near 0."""
        quantizers = tuple(f"{path}." for path in fake_quantizers(model))
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(quantizers)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; scales and offsets are a group of their own, at `scale_lr_multiplier` times the rate.

        An optimizer that the user gave is left alone; a warning says so if it lacks scales.
        """
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        scales = [scale for scale in scale_parameters(self.model) if scale.requires_grad]
        if not given:
            move_scales_to_own_group(optimizer, scales, self._recipe().scale_lr_multiplier)
        elif absent := count_missing(optimizer, scales):
            logger.warning(
                f"The optimizer that was passed in lacks {absent} of the {len(scales)} learned scales and offsets of "
                "the model, which therefore stay as calibrated. Make it after prepare_qat(model, config), or leave it "
                "to QATTrainer."
            )
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; after the last of a step, the gradients of scales are averaged.

        That is over processes; DDP and FSDP2 see to the weights. In one process an override need not call this.
        """
        self._images.look_at(self.model, inputs, "training")
        with (
            scaled_as_it_turns_out(self, *args, **kwargs) if self._loss_scale_unknown else nullcontext(),
            statistics_kept_if_bad(self.model) as losses,
        ):
            loss = super().training_step(model, inputs, *args, **kwargs)
            losses.append(loss)
        self._loss_scale_unknown = False
        if self.accelerator.sync_gradients:
            average_gradients(scales_in_training(self.model))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of all gradients; a step in which it is NaN or infinite is left out, as `BadSteps` says."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # that of fp16 leaves such steps out itself, to find its scale
            self._bad_steps.leave_out_if_bad(model, float(norm), self.state.global_step)
        return norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the task; in training with a teacher, (1 - w) · loss + w · `distillation_loss`.

        Raises:
            ConfigError: a model gives no logits of classes.
        """
        with distributed.autocast_if_sharded(self):
            if self.distillation is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            images = without_labels(self, inputs)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with self.accelerator.autocast():
            distance = self.distillation.loss(self.model, outputs, images)
        if loss_is_scaled(self, num_items_in_batch):
            # `loss` is this batch's part of the mean over all accumulated ones, and `distance` a mean over the batch.
            distance = distance / self.current_gradient_accumulation_steps
        weight = self._recipe().distillation_weight
        loss = (1 - weight) * loss + weight * distance
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; with the training loss come metrics of quantization, and the mean `qat_distillation_loss`.

        `qat_steps_left_out`, where there are any: steps that `BadSteps` has left out.
        """
        if "loss" in logs:
            logs.update(metrics_of_schedule(self.callback_handler.callbacks, self.model))
            if self._bad_steps.total:
                logs["qat_steps_left_out"] = float(self._bad_steps.total)
            if self.distillation is not None:
                logs["qat_distillation_loss"] = self.distillation.mean_loss()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate; the metrics of the own evaluation set before and after training will stand in the model card.

        A model without ranges is calibrated first. Within `fake_quant_disabled(trainer.model)` it is not: those are
        metrics of the float model.
        """
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        of_the_card = eval_dataset is None and metric_key_prefix == "eval"  # figures of one card are of one data set
        if of_the_card and not (self.is_in_train and self.measured_as == "qat"):
            self._record.note(self.measured_as, metrics)
        return metrics

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model over data, as `evaluate` and `predict` do; one without ranges is calibrated first.

        That also works before training where FSDP2 is to split the model.
        """
        self._prepare_if_it_waits(dataloader)
        if self.measured_as is None:
            self.calibrate(preparing.data_to_calibrate_on(self, dataloader))
        distributed.make_ready_to_evaluate(self)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Predict one batch; a warning says so if its images are prepared otherwise than those of training."""
        self._images.look_at(self.model, inputs, "evaluation")
        return super().prediction_step(model, inputs, *args, **kwargs)

    @property
    def measured_as(self) -> str | None:
        """What was done to the model, a key of `publish.accuracy.MEASURED_AS`; `None` while it has no ranges."""
        return self._record.measured_as(self.model, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what `from_pretrained` loads and training goes on from; of a split model, too.

        Called by the user with `push_to_hub=True`, it also exports and pushes, as `push_to_hub` does.
        """
        with distributed.gathered_to_save(self):
            super().save_model(output_dir, _internal_call)

    def convert(self) -> nn.Module:
        """A converted copy of the model, for inference; `trainer.model` stays as it is, and trains on.

        Raises:
            StageError: neither calibrated nor trained.
        """
        return publishing.converted_copy(self.model)

    def save_quantized(self, directory: str | os.PathLike[str]) -> None:
        """Write the converted model, and what prepares its images, for `from_pretrained`.

        Raises:
            StageError: neither calibrated nor trained.
            ExportError: no Hugging Face model.
        """
        model = self.convert()  # in all processes: each may hold a part of the weights
        if self.is_world_process_zero():
            save_model(model, Path(directory), self.processing_class)
        self.accelerator.wait_for_everyone()

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Mapping[str, object]] | None = None,
        **card: Any,
    ) -> Path:
        """Write all that others need, ready to be a repository: int8 safetensors, ONNX, TIDL bundle and model card.

        The ONNX file is verified on real images, and on ONNX Runtime over the whole evaluation set if there is one
        with `compute_metrics`; so is the model. The directory appears as a whole or not at all.

        Args:
            directory: absent, empty, or an earlier export without compiled artifacts, which is replaced.
            metrics: what was measured elsewhere, for the card: `{"float": float_trainer.evaluate()}`.
            card: as in `create_model_card`.

        Returns:
            The directory.

        Raises:
            StageError: neither calibrated nor trained.
            ExportError: the model cannot be expressed as ONNX; the directory holds something else.
            ConfigError: an unknown stage in `metrics`.
        """
        directory, options, given = Path(directory), publishing.card_options(card), given_accuracy(metrics)
        require_onnxruntime()
        facts = self._facts(self.convert(), directory.name)
        inputs = of_first_size(first_inputs(self, self.model, publishing.VERIFIED_INPUTS))
        with self._bars():
            facts = replace(facts, analysis=publishing.analysis_for_card(self, inputs))
            self.exported = publishing.export(self, facts, options, given, inputs, directory)
        self.accelerator.wait_for_everyone()
        return directory

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the training checkpoint in `output_dir`. `export` writes one of its own.

        Args:
            language, license, tags: metadata; tags are added to our own.
            model_name: the title; the name of the repository if left out.
            finetuned_from: the float model on the Hub; the one that the model was loaded from if left out.
            tasks: the Hub's name of the task, where it is not the usual one of the model's class.
            dataset_tags, dataset, dataset_args: ids, names and arguments of the data set of the evaluation.
        """
        if self.is_world_process_zero():
            options = CardOptions(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            output = Path(str(self.args.output_dir))
            with whole_file(output / CARD) as file:
                render(self._facts(self.model, output.absolute().name), options).save(file)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Export to `output_dir/export`, and bring that to the Hub, in one commit.

        The name of the repository, `private`, `revision` and `token` are those of the arguments (`hub_model_id`, or
        the name of `output_dir`; `hub_private_repo`, `hub_revision`, `hub_token`) where they are left out here.

        Args:
            commit_message: of the commit.
            blocking: must be true: a push in the background could fail unseen.
            token: with write permission.
            revision: a branch.
            private: of a new repository.
            kwargs: `metrics` of `export`, and the arguments of `create_model_card`.

        Returns:
            The commit; `None` in all processes but the main one.

        Raises:
            PublishError: with the command to go on. The export is whole then.
            StageError, ExportError, ConfigError: as `export`.
        """
        if not blocking:
            raise ConfigError("push_to_hub(blocking=False) could fail unseen: leave it out, or call it in a thread.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if "/" not in self._repository(""):
            self.init_hf_repo(token=token, private=private)  # only the Hub knows whose token it is
        directory = self.export(Path(str(self.args.output_dir)) / publishing.EXPORT_DIRECTORY, **kwargs)
        if not self.is_world_process_zero():
            return None  # type: ignore[return-value]  # as Trainer does
        self._finish_current_push()
        return push_directory(
            directory,
            self._repository(""),
            token=token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
            commit_message=commit_message or "End of training",
        )

    def _recipe(self) -> QATConfig:
        return require_stage(self.model, Stage.PREPARED, "train").config

    def _facts(self, model: nn.Module, directory: str) -> CardFacts:
        """What a card tells of the model, or of its converted copy; `directory` names it if nothing else does."""
        config = self._recipe()
        return CardFacts(
            model=model,
            repo_id=self._repository(directory),
            config=config,
            schedule=schedule_of(self, config, self.distillation is not None),
            measured_as=self.measured_as or "quantized",
            accuracy=dict(self._record.accuracy),
            images=evaluation_images(self),
            dataset=publishing.dataset_name(self.eval_dataset),
            summary=None,
            contents=None,
        )

    def _repository(self, otherwise: str) -> str:
        """The name of the repository, as far as it is known."""
        return str(self.hub_model_id or self.args.hub_model_id or otherwise)
