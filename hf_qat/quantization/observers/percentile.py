"""The range that leaves out the same share of values on either side, whatever their size (TensorRT's "percentile")."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qat.config.observers import register_observer
from hf_qat.quantization.observers.histogram import Histogram, HistogramObserver
from hf_qat.quantization.scales import percentile_scales
from hf_qat.quantization.spec import QuantizerSpec


#: Upper end of the range; the lower end is at 1 - PERCENTILE. One of those that Wu et al. 2020 compare (table 5).
PERCENTILE = 0.9999


@register_observer("percentile")
class PercentileObserver(HistogramObserver):
    """From the 0.01 % to the 99.99 % quantile of all values."""

    @staticmethod
    def weight_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
        """The scales that clip 0.1 % of the magnitudes of each row."""
        return percentile_scales(rows, spec)

    def _range(self) -> tuple[float, float]:
        if self.histogram.minimum > self.histogram.maximum:
            return self.histogram.minimum, self.histogram.maximum
        return quantile(self.histogram, 1 - PERCENTILE), quantile(self.histogram, PERCENTILE)


def quantile(histogram: Histogram, share: float) -> float:
    """The value below which `share` of the counts lie, linear within a bin, inside the range of the data."""
    reached = histogram.counts.cumsum(0).double()
    target = share * float(reached[-1])
    index = int(torch.searchsorted(reached, target))
    count = float(histogram.counts[index])
    within = (target - (float(reached[index]) - count)) / count
    value = float(histogram.edges[index]) + within * histogram.width
    return min(max(value, histogram.minimum), histogram.maximum)
