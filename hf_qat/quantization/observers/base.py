"""What every observer has in common: it watches the batches of a calibration and ends in a scale and a zero point.

A new observer is a subclass with three methods under `@register_observer("name")`; recipes then know the name. One for
weights, too, says in `weight_scales` how it finds theirs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from hf_qat.config.observers import OBSERVERS
from hf_qat.config.targets import did_you_mean
from hf_qat.errors import CalibrationError, ConfigError
from hf_qat.quantization import collectives
from hf_qat.quantization.fake_quantize import flat
from hf_qat.quantization.scales import largest_magnitude_scales, scale_from_range
from hf_qat.quantization.spec import QuantizerSpec


class RangeCollector(Protocol):
    """What a quantizer asks of whatever collects its range while it observes."""

    def observe(self, x: Tensor) -> None:
        """Take `x` into account."""

    def synchronize(self) -> None:
        """Merge the state over all ranks."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point."""


class Observer(ABC):
    """Collects, batch by batch, what it needs of one activation tensor to choose its range.

    The state is small and lives on the CPU whatever the device of the data. Per tensor only: weights, which may have
    a scale per channel, need no data and have `weight_scales`.
    """

    def __init__(self, spec: QuantizerSpec) -> None:
        self.spec = spec

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take one calibration batch into account.

        Args:
            x: any shape, any float type and memory format; an empty tensor changes nothing.

        Raises:
            CalibrationError: `x` is not of a float type, or holds NaN or Inf.
        """
        if not x.is_floating_point():
            raise CalibrationError(f"a tensor of {x.dtype} has no range to calibrate; pass real numbers (float32)")
        if x.numel() == 0:
            return
        values = flat((x.float() if x.dtype == torch.float64 else x).detach())
        # One transfer for both; NaN and Inf survive aminmax, so this is the whole check.
        low, high = torch.stack(values.aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"a tensor of shape {tuple(x.shape)} has minimum {low} and maximum {high}; a range must be finite: "
                "look for NaN or Inf in the calibration batch and in the weights"
            )
        self._update(values, low, high)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what was observed: two () float32 tensors, on the CPU.

        Raises:
            CalibrationError: nothing was observed.
        """
        minimum, maximum = self._range()
        if minimum > maximum:
            raise CalibrationError(
                "no values were observed, so there is no range; run at least one batch through this part of the model"
            )
        bounds = torch.tensor([minimum, maximum], dtype=torch.float32, device="cpu")
        return scale_from_range(bounds[0], bounds[1], self.spec)

    def synchronize(self) -> None:
        """Merge the state over all `torch.distributed` ranks: N ranks then see what one sees with N times the data.

        Collective: every rank calls it once, after the last `observe`, even a rank that had no data. Without a
        process group it does nothing.
        """
        if collectives.is_active():
            self._merge_ranks()

    @staticmethod
    def weight_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
        """Scales of a weight whose recipe names this observer; here, those that represent the largest magnitudes.

        Args:
            rows: (C, n) float32, finite; one row per scale.
            spec: of the weight, symmetric.

        Returns:
            (C,) float32, positive.
        """
        return largest_magnitude_scales(rows, spec)

    @abstractmethod
    def _update(self, values: Tensor, low: float, high: float) -> None:
        """Add `values`, (n,) float32, bfloat16 or float16, n > 0, all in [low, high]."""

    @abstractmethod
    def _range(self) -> tuple[float, float]:
        """The range to represent, finite; (inf, -inf) if nothing was observed."""

    @abstractmethod
    def _merge_ranks(self) -> None:
        """Merge the state over the ranks of the default process group, which is there."""


def make_observer(spec: QuantizerSpec) -> Observer:
    """A fresh observer of the kind that `spec.observer` names.

    Raises:
        ConfigError: the name is not in `OBSERVERS`.
    """
    if spec.observer not in OBSERVERS:
        nearest = did_you_mean(spec.observer, OBSERVERS)
        raise ConfigError(f"unknown observer {spec.observer!r}.{nearest} Known observers: {sorted(OBSERVERS)}.")
    observer: Observer = OBSERVERS[spec.observer](spec)
    return observer
