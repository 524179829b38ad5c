"""A histogram of fixed size whose counts are exact however the data arrive: in any order, in batches, over ranks.

Bins are [i * 2**e, (i + 1) * 2**e) for integer i, with the least `e` for which the data and 0 fit. Doubling the width
merges whole neighbouring bins, so no count is ever interpolated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_qat.quantization import collectives
from hf_qat.quantization.observers.base import Observer
from hf_qat.quantization.spec import QuantizerSpec


#: At least half of them cover the data: four or more bins to a step of 8-bit codes.
NUM_BINS = 2048

#: Bins are never narrower: the smallest scale, 2**-40, has 256 of them to a step.
LEAST_EXPONENT = -48

#: Values counted at a time: on a CPU, so that their indices stay in cache; on a GPU, so that they fit.
CHUNK = 2**18
CHUNK_ON_GPU = 2**26


class Histogram:
    """Counts of values in `NUM_BINS` equal bins that start at the integer `start` in units of the width.

    Attributes:
        counts: (NUM_BINS,) int64, on the CPU.
        exponent, start: bin `i` is [(start + i) * 2**exponent, (start + i + 1) * 2**exponent).
        minimum, maximum: of the values added; inf and -inf while there are none.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64, device="cpu")
        self.exponent, self.start = LEAST_EXPONENT, 0
        self.minimum, self.maximum = math.inf, -math.inf

    @property
    def width(self) -> float:
        """Of one bin: a power of two."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> Tensor:
        """(NUM_BINS + 1,) float64, exact."""
        return torch.arange(self.start, self.start + NUM_BINS + 1, dtype=torch.float64, device="cpu") * self.width

    def add(self, values: Tensor, low: float, high: float) -> None:
        """Count `values`, (n,), whose least and greatest are `low` and `high`."""
        self._cover(low, high)
        per_width = math.ldexp(1.0, -self.exponent)
        counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=values.device)
        for chunk in torch.split(values, CHUNK if values.device.type == "cpu" else CHUNK_ON_GPU):
            # Exact: a product with a power of two, a floor, and a difference of small integers. torch.histc rounds,
            # counts in float32 and takes about three times as long; bincount likes int16 best.
            index = (chunk.float() * per_width).floor_().sub_(self.start).to(torch.int16)
            counts += torch.bincount(index, minlength=NUM_BINS)
        self.counts += counts.cpu()

    def merge_ranks(self) -> None:
        """Add the counts of all ranks, on the range that all of them need."""
        (low,), (high,) = collectives.range_over_ranks([self.minimum], [self.maximum])
        self._cover(low, high)
        self.counts = collectives.sum_over_ranks(self.counts)

    def _cover(self, low: float, high: float) -> None:
        """Move and widen the bins until they hold [low, high] and 0 beside what they hold already."""
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        exponent = self.exponent
        while True:
            first = math.floor(math.ldexp(min(self.minimum, 0.0), -exponent))
            last = math.floor(math.ldexp(max(self.maximum, 0.0), -exponent))
            if last - first < NUM_BINS:
                break
            exponent += 1
        if (exponent, first) != (self.exponent, self.start):
            self._rebin(exponent, first)

    def _rebin(self, exponent: int, start: int) -> None:
        old = torch.arange(self.start, self.start + NUM_BINS, device="cpu")
        # Floor division by a power of two; bins past the end are empty, so where they go does not matter.
        index = ((old >> (exponent - self.exponent)) - start).clamp_(max=NUM_BINS - 1)
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts)
        self.exponent, self.start = exponent, start


class HistogramObserver(Observer):
    """Base of the observers that choose a range from the histogram of all values."""

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.histogram = Histogram()

    def _update(self, values: Tensor, low: float, high: float) -> None:
        self.histogram.add(values, low, high)

    def _merge_ranks(self) -> None:
        self.histogram.merge_ranks()
