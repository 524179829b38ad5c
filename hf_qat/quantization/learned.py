"""Fake quantization by what an optimizer trains: the logarithm of a scale, and an offset in units of the whole range.

LSQ (Esser et al. 2020, eq. 3) and LSQ+ (Bhalgat et al. 2020, eq. 4-6) by the chain rule, in one operation: spread over
the graph, the arithmetic on single numbers takes longer than the quantizing of a small tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_qat.quantization.fake_quantize import (
    Bound,
    code_bounds,
    is_cheap,
    pass_inside,
    round_as_dtype,
    round_to_codes,
    sum_of_products,
)
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.saved_codes import keep_inputs, keeps_inputs


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


def learned_fake_quantize(x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues) -> Tensor:
    """`clamp(round(x / scale), low, high) * scale`, with gradients for `x` and for the parameters of a quantizer.

    With `g` incoming, `dx = g` where `x` lies between the lowest and the highest value and 0 elsewhere, the gradients
    of the parameters are

        d log2_scale = ln 2 * unlimited_scale / scale * sum(g * (out - x inside, out elsewhere))
        d offset     = scale * span * (sum(dx) - sum(g))

    The first passes straight through a limit of the scale and the rounding of its exponent; the second through the
    limits 0 and 1 of the offset, but where it would lead further away from them it is 0.

    Args:
        x: any shape, any float type; computed in float32.
        log2_scale: () float32, trained.
        offset: () float32, trained, in [0, 1] from the lowest to the highest code; `None` for a zero point of 0.
        values: what these two come to.

    Returns:
        The shape and dtype of `x`.
    """
    if compiles(x, values.scale) and not isinstance(values.low, Tensor):
        from hf_qat.quantization.kernels.cpu.activation import compiled_fake_quantize

        return compiled_fake_quantize(x, log2_scale, offset, values)
    out: Tensor = _Learned.apply(x, log2_scale, offset, values)
    return out


class _Learned(torch.autograd.Function):
    """Saves its input, as it came: its output is computed again, which takes no longer than to keep it.

    Whoever else needs the output in backward shares it (`hf_qat.quantization.saved_codes`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues) -> Tensor:
        arguments = x, values.scale, values.low, values.high
        out = keep_inputs(round_as_dtype(*arguments), round_as_dtype, *arguments)
        shares = x.dtype == torch.float32 and keeps_inputs()
        ctx.save_for_backward(x, offset, out if shares else None)
        ctx.values = values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, out = ctx.saved_tensors
        return *gradients(grad, x, offset, out, ctx.values, ctx.needs_input_grad), None


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
        doffset = offset_gradient(dx.sum() - grad.sum(), offset, values)
    return (dx.to(saved.dtype) if wanted[0] else None), dlog2, doffset


def offset_gradient(passed: Tensor, offset: Tensor, values: QuantizerValues) -> Tensor:
    """Gradient of the offset; `passed` is the sum of the gradients that pass, less that of all."""
    gradient = passed * values.scale * values.span
    if is_cheap(offset) and 0.0 <= float(offset.detach()) <= 1.0:
        return gradient
    away = (offset - offset.clamp(0.0, 1.0)) * gradient < 0  # a step goes against the gradient
    return gradient.masked_fill_(away, 0.0)
