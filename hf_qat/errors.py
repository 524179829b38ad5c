"""One exception type per kind of mistake; each message says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


#: How many names a message gives before it only counts the rest.
NAMED = 5


def listed(names: Sequence[str]) -> str:
    """`a, b, c`; of more than `NAMED` the first ones, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def printable(name: str) -> str:
    """A name that a file holds, on one line: what a terminal would obey, such as escape sequences, becomes `?`."""
    return "".join(c if c.isprintable() else "?" for c in name)


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


class NonFiniteError(HfQatError, ValueError):
    """A model that holds NaN or infinity."""


class TransformError(HfQatError, RuntimeError):
    """A transform of functions that rounding does not follow: `vmap`, `jvp`, batched gradients, …"""


class WeightsError(HfQatError, ValueError):
    """A state dict that does not fit the model."""


class AnalysisError(HfQatError, RuntimeError):
    """An analysis that cannot be made or shown."""


class ExportError(HfQatError, RuntimeError):
    """A model or a path that cannot be exported to."""


class ProcessorError(ExportError):
    """An image processor that `config.yaml` of a TIDL bundle has no words for."""


class FixedBatchError(ExportError):
    """A model whose number of images in a batch cannot be left free in ONNX."""


class InUseError(HfQatError, RuntimeError):
    """A directory that another process writes to."""


class PublishError(HfQatError, RuntimeError):
    """What could not be brought to the Hub; its message ends with the command to go on."""
