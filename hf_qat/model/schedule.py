"""`QATSchedule`: when batch norm and ranges freeze, in fractions of training, stepped as a learning-rate scheduler is.

The phases are those of Krishnamoorthi 2018 (§3.2.2) and Jacob et al. 2018 (§3.1). Which one holds is a pure function
of how many optimizer steps are done; nothing counts forward passes or calls of `train()`.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import ConfigError
from hf_qat.model.state import require_stage
from hf_qat.model.switches import freeze_batch_norm, freeze_ranges


Phase = Literal["batch norm live", "batch norm frozen", "ranges frozen"]

#: In the order in which training goes through them.
PHASES: tuple[Phase, ...] = ("batch norm live", "batch norm frozen", "ranges frozen")


class ScheduleState(TypedDict):
    """What `QATSchedule.state_dict` returns: plain data."""

    step: int
    total_steps: int


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


class QATSchedule:
    """Freezes batch norm, then ranges, at the fractions of training that the model's own config names.

    Make it after calibration, and call `step()` after `optimizer.step()`. The two switches are the schedule's from
    then on: it also undoes what `freeze_batch_norm` and `freeze_ranges` did before.

    Args:
        model: prepared.
        total_steps: optimizer steps of the whole training, from 1.

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
        self._config = require_stage(model, Stage.PREPARED, "schedule quantization-aware training").config
        self._model = model
        self._applied: Phase | None = None
        self.load_state_dict({"step": 0, "total_steps": total_steps})

    @property
    def phase(self) -> Phase:
        """What the next optimizer step trains under: one of `PHASES`."""
        config = self._config
        return phase_at(self._step, self._total_steps, config.freeze_bn_at, config.freeze_ranges_at)

    def step(self) -> None:
        """One more optimizer step is done."""
        self._step += 1
        self._apply()

    def state_dict(self) -> ScheduleState:
        """Where the schedule stands, to resume from."""
        return {"step": self._step, "total_steps": self._total_steps}

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
        self._apply()

    def _apply(self) -> None:
        """Turn the switches, which takes a walk over all modules, only where the phase is another than before."""
        phase = self.phase
        if phase == self._applied:
            return
        freeze_batch_norm(self._model, phase != "batch norm live")
        freeze_ranges(self._model, phase == "ranges frozen")
        self._applied = phase
