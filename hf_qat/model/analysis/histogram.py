"""How numbers are spread over the codes that are to stand for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


#: Bins of a histogram: enough to see a shape, few enough to draw many.
BINS = 64

#: How far a histogram reaches beyond the range of the codes on either side, as a share of the range.
MARGIN = 0.125


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins of one width; what lies beyond the outer edges is counted in the outer bins.

    Attributes:
        counts: `BINS` of them.
        lower, upper: the outer edges.
        first, last: the least and the largest number that a code stands for.
        codes: how many codes there are, from `first` to `last`, in equal steps.
    """

    counts: tuple[int, ...]
    lower: float
    upper: float
    first: float
    last: float
    codes: int

    @property
    def grid(self) -> list[float]:
        """The numbers that the codes stand for."""
        step = (self.last - self.first) / (self.codes - 1)
        return [self.first + code * step for code in range(self.codes)]


def edges(bounds: tuple[float, float]) -> tuple[float, float]:
    """The outer edges of a histogram for codes that reach from and to `bounds`."""
    margin = MARGIN * (bounds[1] - bounds[0])
    return bounds[0] - margin, bounds[1] + margin


def count(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The counts of `x` for codes that reach from and to `bounds`: (BINS,) float64."""
    lower, upper = edges(bounds)
    return torch.histc(x.detach().float().clamp(lower, upper), BINS, lower, upper).double().cpu()


def histogram(counts: Tensor, bounds: tuple[float, float], codes: int) -> Histogram:
    """Counts as `count` gives them, or sums of them, as plain data."""
    lower, upper = edges(bounds)
    return Histogram(tuple(int(n) for n in counts.tolist()), lower, upper, *bounds, codes)
