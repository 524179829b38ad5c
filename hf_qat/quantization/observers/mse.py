"""The range of least squared error between the values and their quantized selves, found on a histogram."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qat.config.observers import register_observer
from hf_qat.quantization.observers.histogram import Histogram, HistogramObserver
from hf_qat.quantization.scales import CLIPPING_FRACTIONS, REFINING_FACTORS, least_error_scales, scale_from_range
from hf_qat.quantization.spec import QuantizerSpec


#: Ranges compared at a time: few enough that PyTorch splits no operation on their histograms among its threads.
TOGETHER = 8

#: Added and taken away again, it rounds a float64 half to even. `round` is split among threads from 2**11 values.
ROUNDER = 1.5 * 2**52

#: How often the two ends of an affine range are searched in turn.
ROUNDS = 2


@register_observer("mse")
class MSEObserver(HistogramObserver):
    """Clips where the loss by clipping and the loss by rounding sum up to the least.

    Both ends are first drawn in by one fraction; that is all where `zero_point` is 0. The ends of an affine range are
    then searched in turn. Power-of-two scales need no search of their own: `scale_from_range` maps the fractions
    to exponents.
    """

    @staticmethod
    def weight_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
        """The scales that clip where the squared error of the quantized weight is least."""
        return least_error_scales(rows, spec)

    def _range(self) -> tuple[float, float]:
        if self.histogram.minimum > self.histogram.maximum:
            return self.histogram.minimum, self.histogram.maximum
        ends = min(self.histogram.minimum, 0.0), max(self.histogram.maximum, 0.0)
        bounds = torch.tensor(ends, dtype=torch.float32, device="cpu")
        both, upper = bounds.new_tensor([[1, 1], [0, 1]], dtype=torch.bool)
        best = self._search(bounds, bounds, both)
        if not self.spec.symmetric:
            for _ in range(ROUNDS):
                best = self._search(best, bounds, upper)
                best = self._search(best, bounds, ~upper)
        low, high = best.tolist()
        return low, high

    def _search(self, current: Tensor, bounds: Tensor, moving: Tensor) -> Tensor:
        """Best (2,) range whose `moving` ends are fractions of `bounds`, and whose others are those of `current`."""
        first = torch.where(moving, torch.outer(bounds.new_tensor(CLIPPING_FRACTIONS), bounds), current)
        best = self._best(torch.cat([current[None], first]))
        finer = torch.where(moving, torch.outer(best.new_tensor(REFINING_FACTORS), best), best)
        # Never beyond the data: nothing is to be won there but the luck of the grid.
        return self._best(torch.stack([finer[:, 0].maximum(bounds[0]), finer[:, 1].minimum(bounds[1])], dim=1))

    def _best(self, ranges: Tensor) -> Tensor:
        """Row of `ranges`, (K, 2), with the least error."""
        scale, zero_point = scale_from_range(ranges[:, 0], ranges[:, 1], self.spec)
        parts = zip(scale.split(TOGETHER), zero_point.split(TOGETHER), strict=True)
        return ranges[torch.cat([squared_errors(self.histogram, *part, self.spec) for part in parts]).argmin()]


def squared_errors(histogram: Histogram, scale: Tensor, zero_point: Tensor, spec: QuantizerSpec) -> Tensor:
    """Expected sum of squared errors of quantized values that are uniform within each bin.

    In units of the step, `y = x / scale` and `c = clamp(round(y), qmin - zero_point, qmax - zero_point)`, the integral
    of the squared error up to `y` is `c / 12 + (y - c)**3 / 3`: 1/12 for each whole step passed, and what is left.
    Unlike a sum over the centres of bins, this is right too where steps are narrower than bins (16 bits).

    Args:
        scale, zero_point: (K,).

    Returns:
        (K,) float64.
    """
    steps = scale.double()[:, None]
    zeros = zero_point.double()[:, None]
    y = histogram.edges / steps
    codes = y.clamp(spec.qmin - zeros, spec.qmax - zeros).add_(ROUNDER).sub_(ROUNDER)
    integral = codes / 12 + (y - codes) ** 3 / 3
    per_value = integral.diff(dim=1) * steps**3 / histogram.width
    return per_value @ histogram.counts.double()
