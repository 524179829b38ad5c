"""What a quantizer's parameters come to, and their gradients, by PyTorch's operations.

The formulas are those of `hf_qat.quantization.learned.learned_fake_quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import (
    Bound,
    code_bounds,
    is_cheap,
    pass_inside,
    round_to_codes,
    sum_of_products,
)


class QuantizerValues(NamedTuple):
    """What the parameters of a quantizer come to.

    Attributes:
        scale: () float32.
        unlimited_scale: `2**log2_scale`, which an upper limit of the scale may have cut to `scale`.
        low, high: lowest and highest code, less the rounded zero point.
        span: highest code less lowest code.
    """

    scale: Tensor
    unlimited_scale: Tensor
    low: Bound
    high: Bound
    span: int


def levels(
    scale: Tensor, unlimited_scale: Tensor, zero_point: Tensor | float | None, qmin: int, qmax: int
) -> QuantizerValues:
    """`QuantizerValues` of a quantizer with one scale.

    `zero_point` is a whole number, or (), which need not be whole; `None` for 0.
    """
    if isinstance(zero_point, float):
        return QuantizerValues(scale, unlimited_scale, qmin - zero_point, qmax - zero_point, qmax - qmin)
    low, high = code_bounds(zero_point, scale, qmin, qmax, None)
    return QuantizerValues(scale, unlimited_scale, low, high, qmax - qmin)


def gradients(
    grad: Tensor,
    saved: Tensor,
    offset: Tensor | None,
    out: Tensor | None,
    values: QuantizerValues,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the input, of `log2_scale` and of the offset, where they are `wanted`.

    Args:
        grad: that of what was put out.
        saved: the input.
        offset, values: as of `learned_fake_quantize`.
        out: what was put out, in float32, if it is at hand.
        wanted: one for each gradient.
    """
    scale, unlimited_scale, low, high, _ = values
    x, grad = saved.float(), grad.float()
    spent = dlog2 = doffset = None
    own = out is None
    if wanted[1]:
        # One sum of what rounding does to each value: the difference of two sums would cancel.
        spent = pass_inside(x, x, scale, low, high)
        out = round_to_codes(x, scale, low, high) if out is None else out
        dlog2 = sum_of_products(grad, torch.sub(out, spent, out=spent)) * math.log(2.0)
        if unlimited_scale is not scale:
            dlog2 *= unlimited_scale / scale
    alike = spent is not None and spent.stride() == grad.stride()
    dx = pass_inside(grad, x, scale, low, high, spent if alike else None)
    if offset is not None and wanted[2]:
        # One sum again, of what does not pass; written over the values that were put out, if they are at hand for it.
        spent = out if own and out is not None and out.stride() == dx.stride() else None
        doffset = offset_gradient(torch.sub(dx, grad, out=spent).sum(), offset, values)
    return (dx.to(saved.dtype) if wanted[0] else None), dlog2, doffset


def offset_gradient(passed: Tensor, offset: Tensor, values: QuantizerValues) -> Tensor:
    """Gradient of the offset; `passed` is the sum of the gradients that pass, less that of all."""
    gradient = passed * values.scale * values.span
    if is_cheap(offset) and 0.0 <= float(offset.detach()) <= 1.0:
        return gradient
    away = (offset - offset.clamp(0.0, 1.0)) * gradient < 0  # a step goes against the gradient
    return gradient.masked_fill_(away, 0.0)
