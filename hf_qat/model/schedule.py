"""`QATSchedule`: when batch norm and ranges freeze, in fractions of training, stepped as a learning-rate scheduler is.

The phases are those of Krishnamoorthi 2018 (§3.2.2) and Jacob et al. 2018 (§3.1). Which one holds is a pure function
of how many optimizer steps are done; nothing counts forward passes or calls of `train()`.

A net that is trained from scratch, and a new head, need more: see `untrained.py` and `outgrown.py`. A net from scratch
without batch norm learns in float at first, as in Jacob et al. 2018 (§3.1): ranges that move that fast hold it back.
"""

from __future__ import annotations

import logging
from typing import Literal, TypedDict

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import ConfigError, listed
from hf_qat.model.call_in_training import CallInTraining
from hf_qat.model.eager import uncompiled
from hf_qat.model.outgrown import renew_outgrown_ranges, set_ranges_anew
from hf_qat.model.state import require_stage
from hf_qat.model.switches import freeze_batch_norm, freeze_ranges
from hf_qat.model.untrained import has_batch_norms, is_untrained, new_parameters, untrained_batch_norms
from hf_qat.quantization.quantizer import fake_quantizers


logger = logging.getLogger(__name__)

Phase = Literal["batch norm live", "batch norm frozen", "ranges frozen"]

#: In the order in which training goes through them.
PHASES: tuple[Phase, ...] = ("batch norm live", "batch norm frozen", "ranges frozen")


#: Fraction of training for which a net from scratch without batch norm learns in float. Measured: a ViT on digits.
FLOAT_UNTIL = 0.25

#: Ranges are observed again after so many steps of a training, evenly spread, and after step 1, 2, 4, 8, …
OBSERVATIONS = 20


class _Steps(TypedDict):
    step: int
    total_steps: int


class ScheduleState(_Steps, total=False):
    """What `QATSchedule.state_dict` returns: plain data.

    `freeze_bn_at` where it is not that of the config; `quantize_at`, a fraction of training, where it is not 0.
    """

    freeze_bn_at: float
    quantize_at: float


def phase_at(step: int, total_steps: int, freeze_bn_at: float, freeze_ranges_at: float) -> Phase:
    """The phase of the optimizer step that follows `step` others.

    A fraction f has passed when step / total_steps ≥ f: 0 is before the first step, and 1 after the last one.

    Args:
        step: optimizer steps done, from 0; beyond `total_steps` the last phase goes on.
        total_steps: at least 1.
        freeze_bn_at, freeze_ranges_at: fractions of training, as in `QATConfig`.

    Examples:
        >>> [phase_at(step, 4, 0.5, 0.75) for step in (1, 2, 3)]
        ['batch norm live', 'batch norm frozen', 'ranges frozen']
    """
    # Not step ≥ fraction * total: in floating point 0.55 * 100 is more than 55, but 55 / 100 is 0.55.
    done = step / total_steps
    if done >= freeze_ranges_at:
        return "ranges frozen"
    return "batch norm frozen" if done >= freeze_bn_at else "batch norm live"


def is_observed_again(step: int, total_steps: int) -> bool:
    """Whether ranges are observed again after `step` optimizer steps, from 1.

    Examples:
        >>> [step for step in range(1, 101) if is_observed_again(step, 100)][:10]
        [1, 2, 4, 5, 8, 10, 15, 16, 20, 25]
    """
    power_of_two = step & (step - 1) == 0
    return power_of_two or step * OBSERVATIONS // total_steps > (step - 1) * OBSERVATIONS // total_steps


class QATSchedule:
    """Freezes batch norm, then ranges, at the fractions of training that the model's own config names.

    Make it after calibration, and call `step()` after `optimizer.step()`. The two switches are the schedule's from
    then on: it also undoes what `freeze_batch_norm` and `freeze_ranges` did before.

    Batch norms that no batch has touched yet, and those of a model with a new head, are live until ranges freeze,
    unless the config says more than 0: at the learning rate of a training from scratch, a net whose batch norm stands
    still ends up worse, in float too. A net from scratch that has norms, and no batch norm, learns in float for the
    first quarter, is evaluated quantized, and gets its ranges anew at the end of it. At 20 steps, and at steps 1, 2,
    4, …, ranges are observed again on the batch of that step; those that training has outgrown by half of their width
    are set anew, in a model that was trained already if they also cut off much. All of that is logged.

    Args:
        model: prepared.
        total_steps: optimizer steps of the whole training, from 1.

    Attributes:
        config: the recipe of the model.

    Raises:
        StageError: the model is not a prepared one.
        ConfigError: `total_steps` is no whole number from 1.

    Examples:
        schedule = QATSchedule(model, total_steps=epochs * len(loader))
        for images, labels in loader:
            loss_function(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        self.config = require_stage(model, Stage.PREPARED, "schedule quantization-aware training").config
        self._model = uncompiled(model)
        self._applied: Phase | None = None
        self._freeze_bn_at = self._freezing_of_batch_norm()
        self._quantize_at = self._end_of_float()
        self._waits: bool | None = None
        self._call = CallInTraining(model)
        self._outgrown: set[str] = set()
        self.load_state_dict({"step": 0, "total_steps": total_steps})

    @property
    def phase(self) -> Phase:
        """What the next optimizer step trains under: one of `PHASES`."""
        return phase_at(self._step, self._total_steps, self._freeze_bn_at, self.config.freeze_ranges_at)

    @property
    def in_float(self) -> bool:
        """Whether the next optimizer step is computed in float, as the first ones of a net from scratch are."""
        return bool(self._waits)

    def step(self) -> None:
        """One more optimizer step is done."""
        self._step += 1
        self._apply()

    def state_dict(self) -> ScheduleState:
        """Where the schedule stands, to resume from."""
        state: ScheduleState = {"step": self._step, "total_steps": self._total_steps}
        if self._freeze_bn_at != self.config.freeze_bn_at:
            state["freeze_bn_at"] = self._freeze_bn_at
        if self._quantize_at:
            state["quantize_at"] = self._quantize_at
        return state

    def load_state_dict(self, state: ScheduleState) -> None:
        """Go on from what `state_dict` gave, and put the model in that phase.

        Raises:
            ConfigError: `total_steps` is no whole number from 1, or `step` none from 0.
        """
        for name, least in (("step", 0), ("total_steps", 1)):
            value = state[name]  # type: ignore[literal-required]
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} of a QATSchedule must be a whole number from {least}, not {value!r}.")
        self._step, self._total_steps = state["step"], state["total_steps"]
        self._freeze_bn_at = state.get("freeze_bn_at", self._freeze_bn_at)
        self._quantize_at = state.get("quantize_at", self._quantize_at)
        self._apply()

    def _freezing_of_batch_norm(self) -> float:
        """The fraction of training after which batch norm freezes; not 0 where its statistics are about to change."""
        why = self._why_statistics_change() if self.config.freeze_bn_at == 0 else None
        if why is None:
            return self.config.freeze_bn_at
        live_until = self.config.freeze_ranges_at
        logger.warning("Batch norm follows the data for the first %.0f %% of training: %s.", 100 * live_until, why)
        return live_until

    def _end_of_float(self) -> float:
        """The fraction of training that is computed in float; not 0 for a net from scratch without batch norm."""
        if has_batch_norms(self._model) or not is_untrained(self._model):
            return 0.0
        until = min(FLOAT_UNTIL, self.config.freeze_ranges_at)
        logger.warning(
            "The net is untrained: its norms are as they were made. It learns in float for the first %.0f %% of "
            "training, and its ranges are collected anew then; it is evaluated quantized.",
            100 * until,
        )
        return until

    def _why_statistics_change(self) -> str | None:
        if untrained := untrained_batch_norms(self._model):
            return f"{len(untrained)} batch norms have the statistics that they were made with, not worth freezing"
        new = new_parameters(self._model) if has_batch_norms(self._model) else []
        return f"{listed(new)} did not come from the checkpoint, and the rest has still to fit to it" if new else None

    def _observe_again(self) -> None:
        """Set the ranges anew that the step before has outgrown, and look at the next step if it is one to look at.

        After the last step in float, all of them are set anew.
        """
        call, was_waiting = self._call.take(), self._waits
        self._wait_in_training(self._is_in_float(self._step))
        if was_waiting and not self._waits and call is not None:
            set_ranges_anew(self._model, call)
            call = None
        if self.phase == "ranges frozen":
            return
        trained = not self._begins_anew()
        renewed = set() if call is None else set(renew_outgrown_ranges(self._model, call, trained))
        outgrown = renewed - self._outgrown
        if outgrown:
            log = logger.info if self._outgrown else logger.warning
            log(
                "Training has outgrown %d of the ranges that it began with (%s), as it does those of a new head: they "
                "are set anew.",
                len(outgrown),
                listed(sorted(outgrown)),
            )
            self._outgrown |= outgrown
        is_last_in_float = bool(self._waits) and not self._is_in_float(self._step + 1)
        if is_last_in_float or is_observed_again(self._step + 1, self._total_steps):
            self._call.listen()

    def _begins_anew(self) -> bool:
        """Whether the model was untrained, or had a new head, when training began."""
        return self._freeze_bn_at > self.config.freeze_bn_at or self._quantize_at > 0

    def _is_in_float(self, step: int) -> bool:
        """Whether the step after `step` others is computed in float."""
        return step / self._total_steps < self._quantize_at

    def _wait_in_training(self, waits: bool) -> None:
        """Turn the switch of all quantizers that lets values pass in training."""
        if waits != self._waits:
            for quantizer in fake_quantizers(self._model).values():
                quantizer.waits = waits
            self._waits = waits

    def _apply(self) -> None:
        """Turn the switches, which takes a walk over all modules, only where the phase is another than before."""
        self._observe_again()
        phase = self.phase
        if phase == self._applied:
            return
        freeze_batch_norm(self._model, phase != "batch norm live")
        freeze_ranges(self._model, phase == "ranges frozen")
        self._applied = phase
