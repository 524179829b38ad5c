"""The int32 bias, with the scale that integer kernels expect."""

from __future__ import annotations

import torch
from torch import Tensor


INT32_MAX = 2**31 - 1


def bias_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Scale of the int32 bias: `input_scale * weight_scale`, () or (C,) float32 (Jacob et al. 2018, §2.4)."""
    return (input_scale * weight_scale).to(torch.float32)


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """(C,) int32 codes of a bias, saturated; computed in float64, where every int32 is exact."""
    codes = torch.round(bias.double() / scale.double()).clamp_(-INT32_MAX, INT32_MAX)
    return codes.to(torch.int32)


def fit_weight_scale(weight_scale: Tensor, bias: Tensor, input_scale: Tensor, power_of_two: bool) -> Tensor:
    """Enlarge the weight scale of channels whose bias would not fit in int32.

    That is a channel of nearly zero weights with a real bias; its weights lose resolution that they do not need, where
    a saturated bias would ruin the channel.
    """
    needed = bias.abs() / (input_scale * INT32_MAX * 0.5)
    if weight_scale.dim() == 0:
        needed = needed.max()
    if power_of_two:
        needed = torch.exp2(torch.ceil(torch.log2(needed.clamp_min(torch.finfo(torch.float32).tiny))))
    return torch.maximum(weight_scale, needed.to(weight_scale))
