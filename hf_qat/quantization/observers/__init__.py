"""How calibration finds the range of an activation: a registry of observers, one way to look at data each."""

from hf_qat.config.observers import OBSERVERS, register_observer
from hf_qat.quantization.collectives import synchronized_range
from hf_qat.quantization.observers.base import Observer, RangeCollector, make_observer
from hf_qat.quantization.observers.minmax import (
    AVERAGING_CONSTANT,
    MinMaxObserver,
    MovingAverageObserver,
    moving_average,
)
from hf_qat.quantization.observers.mse import MSEObserver
from hf_qat.quantization.observers.percentile import PercentileObserver


__all__ = [
    "AVERAGING_CONSTANT",
    "OBSERVERS",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "RangeCollector",
    "make_observer",
    "moving_average",
    "register_observer",
    "synchronized_range",
]
