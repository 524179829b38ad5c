"""The scale of a weight, by the observer that its quantizer names."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qat.config.observers import OBSERVERS
from hf_qat.errors import CalibrationError, ConfigError
from hf_qat.quantization.spec import QuantizerSpec


def weight_scale(weight: Tensor, spec: QuantizerSpec) -> Tensor:
    """Scale of a symmetrically quantized weight, per channel where `spec.axis` names one, by `spec.observer`.

    See `weight_scales` of the observers: `"minmax"` represents the largest magnitude, `"percentile"` clips 0.1 % of
    the magnitudes, and `"mse"` clips where the squared error of the quantized weight is least. A channel of zeros gets
    the scale of the largest magnitude in the whole weight, so that its bias, in units of that scale, still fits int32.

    Args:
        weight: any shape, any float type.
        spec: the quantizer: `axis`, the code range, `power_of_two`, `observer`.

    Returns:
        () or (C,), float32, on the device of `weight`.

    Raises:
        CalibrationError: the weight holds NaN or Inf.
        ConfigError: no observer is called `spec.observer`.
    """
    if spec.observer not in OBSERVERS:
        raise ConfigError(
            f"observer {spec.observer!r} has no rule for the scale of a weight; choose one of {sorted(OBSERVERS)}"
        )
    with torch.no_grad():
        rows = rows_of(weight.detach().float(), spec.axis)
        if not torch.stack(rows.aminmax()).isfinite().all():
            raise CalibrationError(
                f"a weight of shape {tuple(weight.shape)} holds NaN or Inf, so it has no scale; "
                "training has diverged, or the checkpoint that was loaded has it; load weights from before that"
            )
        scale: Tensor = OBSERVERS[spec.observer].weight_scales(rows, spec)
        return scale if spec.axis is not None else scale.squeeze(0)


def rows_of(weight: Tensor, axis: int | None) -> Tensor:
    """One row per scale: (1, numel) or (C, numel / C)."""
    return weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
