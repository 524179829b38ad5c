"""What training learned of a quantizer, and is no number any more: said where it is used, with what to do."""

from __future__ import annotations

import math

from torch import Tensor

from hf_qat.errors import NonFiniteError
from hf_qat.quantization.fake_quantize import is_cheap


#: Where `2**log2_scale`, the exponent rounded or not, is too large for float32.
TOO_LARGE = 127.5


def require_finite(path: str, log2_scale: Tensor, offset: Tensor | None) -> None:
    """Scale and offset of the quantizer at `path`, both (), must be finite; where reading them waits for nobody.

    Raises:
        NonFiniteError: one is not.
    """
    if not is_cheap(log2_scale):
        return
    exponent = log2_scale.item()
    if not exponent < TOO_LARGE:  # NaN is not less than anything
        raise NonFiniteError(_diverged(f"{path}.log2_scale", exponent))
    if offset is not None and not math.isfinite(offset.item()):
        raise NonFiniteError(_diverged(f"{path}.offset", offset.item()))


def _diverged(name: str, value: float) -> str:
    return (
        f"{name} is {value}: training has diverged. Load weights and scales from before it; lower the learning rate, "
        "and leave out steps whose gradients hold NaN or infinity, as QATTrainer does. Where the weights are finite, "
        "calibrate(model, batches) finds new scales."
    )
