"""One exception type per kind of mistake; each message says what was wrong, where, and what to do."""

from __future__ import annotations


class HfQatError(Exception):
    """Base of every error that `hf_qat` raises on purpose."""


class ConfigError(HfQatError, ValueError):
    """A `QATConfig` that cannot be honoured: unknown target or key, impossible bits, a glob that matches nothing."""


class CaptureError(HfQatError, RuntimeError):
    """A module whose forward pass cannot become a graph, or is called in a way that was not captured."""


class StageError(HfQatError, RuntimeError):
    """A call that comes too early or too late: preparing twice, training a converted model, …"""


class CalibrationError(HfQatError, ValueError):
    """Calibration data that cannot give ranges: empty, integer, NaN."""


class WeightsError(HfQatError, ValueError):
    """A state dict that does not fit the model."""


class ExportError(HfQatError, RuntimeError):
    """A model or a path that cannot be exported to."""


class PublishError(HfQatError, RuntimeError):
    """What could not be brought to the Hub; its message ends with the command to go on."""
