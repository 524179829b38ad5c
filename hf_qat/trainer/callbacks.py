"""What happens around the steps of `QATTrainer`: calibration before the first one, the schedule and metrics after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_qat.config.qat_config import QATConfig
from hf_qat.model.schedule import PHASES, QATSchedule, ScheduleState
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.fsdp import gathered
from hf_qat.trainer.histories import CodeHistory
from hf_qat.trainer.suspicions import warn_against_recipe, warn_of_few_samples


logger = logging.get_logger(__name__)


def needs_calibration(model: nn.Module) -> bool:
    """Whether any quantizer of a prepared model is without a range: neither calibrated nor loaded with one."""
    observed = [quantizer.observed for quantizer in fake_quantizers(model).values()]
    return bool(observed) and bool((torch.stack(observed) == 0).any())


class CalibrationCallback(TrainerCallback):
    """Calls `calibrate` when training begins with a model that needs it; not so after resuming."""

    def __init__(self, calibrate: Callable[[], None]) -> None:
        self.calibrate = calibrate

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before any step, and before the schedule freezes a range."""
        if needs_calibration(kwargs["model"]):
            self.calibrate()


class ScheduleCallback(TrainerCallback, ExportableState):
    """Moves a `QATSchedule` to where `TrainerState` is; gradient accumulation and evaluation leave that alone.

    On resuming, the phase follows from the step. Of the state in `trainer_state.json`, which is a record to read, only
    the moments at which batch norm freezes and quantization begins are needed: they may depend on what the model was
    before training.
    """

    def __init__(self) -> None:
        self.schedule: QATSchedule | None = None
        self.progress: dict[str, Any] = {}
        self.initial_scales: Tensor | None = None
        self.codes = CodeHistory()

    def state(self) -> dict[str, Any]:
        """The phase, the step and the number of steps, as plain data."""
        return {"args": {}, "attributes": {"progress": self.progress}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or go on at the step of the checkpoint; a training of no steps has no schedule."""
        model: nn.Module = kwargs["model"]
        self.schedule = None
        if state.max_steps == 0:
            return
        self.schedule = QATSchedule(model, state.max_steps)
        self.initial_scales = learned_scales(model)
        self.codes = CodeHistory()
        self._follow(self.schedule, state, _recorded(state) if state.global_step else {})
        live_until = freezing_of_batch_norm([self], self.schedule.config)
        warn_of_few_samples(model, self.schedule.config, live_until, args, state.max_steps)
        if kwargs.get("optimizer") is not None:
            warn_against_recipe(model, self.schedule.config, kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more optimizer step is done."""
        if self.schedule is not None:
            self._follow(self.schedule, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so where training was stopped before anything was quantized."""
        if self.schedule is not None and self.schedule.in_float:
            logger.warning(
                "Training ended at step %d of %d, in the part that an untrained net learns in float: its ranges are "
                "those from before. Call calibrate() before it is evaluated or converted, or train on.",
                state.global_step,
                state.max_steps,
            )

    def _follow(self, schedule: QATSchedule, state: TrainerState, recorded: Mapping[str, Any] | None = None) -> None:
        now: ScheduleState = {"step": state.global_step, "total_steps": state.max_steps}
        if recorded:
            now["freeze_bn_at"] = recorded.get("freeze_bn_at", schedule.config.freeze_bn_at)
            now["quantize_at"] = recorded.get("quantize_at", 0.0)
        schedule.load_state_dict(now)
        self.progress = {"phase": schedule.phase, **schedule.state_dict()}

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """What the Trainer logs beside the loss.

        Returns:
            `qat_phase`: 0 batch norm live, 1 batch norm frozen, 2 ranges frozen.
            `qat_clipped_weights`: share of weights that lie beyond their codes.
            `qat_oscillating_weights`: share of weights whose code has turned back since the log before, as seen since
            this run began.
            `qat_scale_drift`, where scales are learned: mean |log2(scale / scale when this run began)|.
        """
        if self.schedule is None:
            return {}
        with gathered(model):
            numbers = {
                "qat_clipped_weights": clipped_weights(model),
                "qat_oscillating_weights": self.codes.share_turned(model),
            }
        scales = learned_scales(model)
        if scales is not None and self.initial_scales is not None:
            numbers["qat_scale_drift"] = (scales - self.initial_scales).abs().mean()
        values = torch.stack(list(numbers.values())).tolist()  # one wait for the device
        return {"qat_phase": float(PHASES.index(self.schedule.phase)), **dict(zip(numbers, values, strict=True))}


def _recorded(state: TrainerState) -> Mapping[str, Any]:
    """The `progress` of the run that `state` was read from."""
    callbacks: Any = state.stateful_callbacks or {}
    saved = callbacks.get(ScheduleCallback.__name__, {})
    first = saved[0] if isinstance(saved, list) else saved
    progress: Mapping[str, Any] = first.get("attributes", {}).get("progress", {})
    return progress


def metrics_of_schedule(callbacks: Iterable[TrainerCallback], model: nn.Module) -> dict[str, float]:
    """`ScheduleCallback.metrics` of the one among a trainer's callbacks; resuming may have put a new one there."""
    for callback in callbacks:
        if isinstance(callback, ScheduleCallback):
            return callback.metrics(model)
    return {}


def freezing_of_batch_norm(callbacks: Iterable[TrainerCallback], config: QATConfig) -> float:
    """The fraction of the latest training after which batch norm froze; that of the recipe if there was none."""
    for callback in callbacks:
        if isinstance(callback, ScheduleCallback):
            return float(callback.progress.get("freeze_bn_at", config.freeze_bn_at))
    return config.freeze_bn_at


@torch.no_grad()
def learned_scales(model: nn.Module) -> Tensor | None:
    """A copy of the log2 of all learned scales: (number of scales,) float32; `None` where none is learned."""
    scales = [quantizer.log2_scale.flatten() for quantizer in fake_quantizers(model).values() if quantizer.learned]
    return torch.cat(scales).float() if scales else None


@torch.no_grad()
def clipped_weights(model: nn.Module) -> Tensor:
    """Share of the folded weights that lie beyond their codes, by more than rounding takes up: () float32."""
    clipped, total = [], 0
    for layer in qat_layers(model).values():
        quantizer = layer.weight_quantizer
        codes = layer.float_weight().movedim(layer.channel_axis, 0).flatten(1) / quantizer.scale.view(-1, 1)
        clipped.append(((codes < quantizer.spec.qmin - 0.5) | (codes > quantizer.spec.qmax + 0.5)).sum())
        total += codes.numel()
    return torch.stack(clipped).sum().float() / total if clipped else torch.tensor(0.0, dtype=torch.float32)
