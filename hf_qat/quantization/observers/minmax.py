"""Ranges from extremes: over all batches, or their moving average (Jacob et al. 2018, §3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_qat.config.observers import register_observer
from hf_qat.quantization import collectives
from hf_qat.quantization.observers.base import Observer
from hf_qat.quantization.spec import QuantizerSpec


#: Weight of a new batch in a moving average: PyTorch's choice in its `MovingAverageMinMaxObserver`.
AVERAGING_CONSTANT = 0.01


def moving_average(running: Tensor, new: Tensor, momentum: float = AVERAGING_CONSTANT) -> Tensor:
    """`running + momentum * (new - running)`: `momentum` is the weight of the new value, as in batch norm."""
    return torch.lerp(running, new, momentum)


@register_observer("minmax")
class MinMaxObserver(Observer):
    """The least and the greatest value of all batches."""

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.minimum, self.maximum = math.inf, -math.inf

    def _update(self, values: Tensor, low: float, high: float) -> None:
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def _range(self) -> tuple[float, float]:
        return self.minimum, self.maximum

    def _merge_ranks(self) -> None:
        (self.minimum,), (self.maximum,) = collectives.range_over_ranks([self.minimum], [self.maximum])


@register_observer("moving_average")
class MovingAverageObserver(Observer):
    """Exponential moving averages of the least and of the greatest value of each batch.

    Until `1 / AVERAGING_CONSTANT` batches it is their plain mean: otherwise the first batch alone would decide
    (0.99**10 = 90 % of the result after ten batches). The extremes are kept batch by batch, so that ranks can agree
    on those of each step before they are averaged.
    """

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.minima: list[float] = []
        self.maxima: list[float] = []

    def _update(self, values: Tensor, low: float, high: float) -> None:
        self.minima.append(low)
        self.maxima.append(high)

    def _range(self) -> tuple[float, float]:
        if not self.minima:
            return math.inf, -math.inf
        return _averaged(self.minima), _averaged(self.maxima)

    def _merge_ranks(self) -> None:
        missing = collectives.max_over_ranks(len(self.minima)) - len(self.minima)
        if missing + len(self.minima) == 0:
            return
        self.minima, self.maxima = collectives.range_over_ranks(
            self.minima + [math.inf] * missing, self.maxima + [-math.inf] * missing
        )


def _averaged(values: list[float]) -> float:
    running = torch.tensor(values[0], dtype=torch.float32, device="cpu")
    for number, value in enumerate(values[1:], start=2):
        running = moving_average(running, running.new_tensor(value), max(AVERAGING_CONSTANT, 1 / number))
    return float(running)
