"""The fake-quantize operation and its gradients, bit-compatible with ONNX `QuantizeLinear` / `DequantizeLinear`.

Straight-through estimator: Bengio et al. 2013. Learned scale: LSQ, Esser et al. 2020, eq. 3 and §2.2. Learned offset:
LSQ+, Bhalgat et al. 2020, eq. 4-6. Folded weights: Krishnamoorthi 2018, §3.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


Bound = Any  # a number, or a tensor where reading it would wait for a GPU


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Integer codes `clamp(round_half_even(x / scale) + zero_point, qmin, qmax)`.

    Args:
        x: any shape, float32.
        scale: () or (C,), float32, positive.
        zero_point: () or (C,), integer-valued, or `None` for 0.
        qmin, qmax: lowest and highest code.
        axis: the axis of `x` that `scale` runs along, if it is (C,).

    Returns:
        int32, the shape of `x`.
    """
    codes = torch.div(x, _along(scale, x, axis)).round_()
    if zero_point is not None:
        codes.add_(_along(zero_point, x, axis))
    return codes.clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None = None) -> Tensor:
    """Real numbers `(codes - zero_point) * scale`, float32, the shape of `codes`."""
    centred = codes.to(torch.float32)
    if zero_point is not None:
        centred = centred - _along(zero_point, codes, axis)
    return centred * _along(scale, codes, axis)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """`dequantize(quantize(x))`, with gradients.

    With `y = x / scale`, `n = qmin - zero_point` and `p = qmax - zero_point`, the gradients for an incoming `g` are

        dx     = g where n < y < p, else 0                                              (straight-through)
        dscale = sum(g * (round(y) - y)) inside, sum(g * n or g * p) where saturated    (LSQ, eq. 3)
        dzero  = sum(g * -scale) where saturated                                        (LSQ+)

    Args:
        x, scale, zero_point, qmin, qmax, axis: as in `quantize`; `scale` and `zero_point` may require gradients, and
            `zero_point` may be fractional: it is rounded, and the gradient passes straight through the rounding.
        gradient_scale: factor on the gradients of `scale` and `zero_point`: LSQ §2.2 advises 1 / sqrt(numel * qmax).

    Returns:
        Same shape and dtype as `x`; computed in float32.
    """
    dtype = x.dtype
    out: Tensor = _FakeQuantize.apply(x.float(), scale, zero_point, qmin, qmax, axis, gradient_scale)
    return out.to(dtype)


def fold_fake_quantize(weight: Tensor, multiplier: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> Tensor:
    """Fold a factor per channel into a weight and quantize it, in one expression.

    `clamp(round(weight * multiplier), qmin, qmax) * step`: with `multiplier = factor / scale` and `step = scale` this
    is the fake-quantized folded weight; with `step = scale / factor` it is that weight with the factor divided out
    again, for a convolution that a live batch norm follows. Gradients reach `weight` (straight through, inside the
    range), `multiplier` and `step`, so scale and factor get theirs by the chain rule.

    Args:
        weight: any shape, float32.
        multiplier, step: () or (C,), float32; C is the size of `weight` along `axis`.
    """
    out: Tensor = _FoldFakeQuantize.apply(weight, multiplier, step, qmin, qmax, axis)
    return out


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """View a (C,) tensor so that it broadcasts along `axis` of `x`."""
    if parameter.dim() == 0 or axis is None:
        return parameter
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.view(shape)


def _sum_to(x: Tensor, parameter: Tensor, axis: int | None) -> Tensor:
    """Sum `x` over all axes that `parameter` does not have."""
    if parameter.dim() == 0 or axis is None:
        return x.sum()
    return x.sum([d for d in range(x.dim()) if d != axis % x.dim()])


def _inner(a: Tensor, b: Tensor, parameter: Tensor, axis: int | None) -> Tensor:
    """`sum(a * b)` over all axes that `parameter` does not have."""
    if parameter.dim() == 0 or axis is None:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    # Not a batched product of rows with rows: that takes three times as long on a CPU.
    return _sum_to(a * b, parameter, axis)


def _bounds(zero_point: Tensor | None, x: Tensor, qmin: int, qmax: int, axis: int | None) -> tuple[Bound, Bound]:
    """`qmin - zero_point` and `qmax - zero_point`: numbers where reading them costs nothing, else tensors."""
    if zero_point is None:
        return float(qmin), float(qmax)
    zero = zero_point.detach().round()
    if _is_cheap(zero):
        return qmin - float(zero), qmax - float(zero)
    zero = _along(zero, x, axis)
    return qmin - zero, qmax - zero


def _is_cheap(parameter: Tensor) -> bool:
    """Whether reading its value makes nobody wait."""
    return parameter.dim() == 0 and parameter.device.type == "cpu"


def _inside(grad: Tensor, x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
    """`grad` where `low * step < x < high * step`, else 0, as a new tensor; one pass where the bounds are numbers."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        y = torch.div(x, step)
        return torch.where((y > low) & (y < high), grad, grad.new_zeros(()))
    if _is_cheap(step):
        unit = float(step)
        return torch.ops.aten.hardtanh_backward(grad, x, low * unit, high * unit)
    return _pass_between(grad, torch.div(x, step), low, high)


def _pass_between(grad: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    """`grad` where `low < y < high`, else 0, written over `y`: no mask, and no other tensor, is made."""
    passed: Tensor = torch.ops.aten.hardtanh_backward.grad_input(grad, y, low, high, grad_input=y)
    return passed


class _FakeQuantize(torch.autograd.Function):
    """Saves its input, and the output only where a scale is learned; which values pass is found out again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        axis: int | None,
        gradient_scale: float,
    ) -> Tensor:
        low, high = _bounds(zero_point, x, qmin, qmax, axis)
        step = _along(scale, x, axis)
        # One new tensor and three passes over it while it is in cache: filling a second one would cost as much again.
        out = torch.div(x, step).round_().clamp_(low, high).mul_(step)
        learned = scale.requires_grad or (zero_point is not None and zero_point.requires_grad)
        needed = learned or x.requires_grad
        ctx.save_for_backward(x if needed else None, out if learned else None, scale, zero_point)
        ctx.low, ctx.high, ctx.axis, ctx.gradient_scale = low, high, axis, gradient_scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, scale, zero_point = ctx.saved_tensors
        axis = ctx.axis
        dx = _inside(grad, x, _along(scale, x, axis), ctx.low, ctx.high)
        dscale = dzero = None
        if ctx.needs_input_grad[1]:
            # <g, out> - <dx, x> is the scale times the code where saturated, times (code - x / scale) inside.
            dscale = (_inner(grad, out, scale, axis) - _inner(dx, x, scale, axis)) / scale * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            saturated = _sum_to(grad, zero_point, axis) - _sum_to(dx, zero_point, axis)
            dzero = saturated * scale * -ctx.gradient_scale
        return (dx if ctx.needs_input_grad[0] else None), dscale, dzero, None, None, None, None


class _FoldFakeQuantize(torch.autograd.Function):
    """Saves the weight, which is kept anyway, and the output, which the convolution behind it saves, too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, multiplier: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> Tensor:
        out = torch.mul(weight, _along(multiplier, weight, axis))
        out.round_().clamp_(qmin, qmax).mul_(_along(step, weight, axis))
        ctx.save_for_backward(weight, out if step.requires_grad else None, multiplier, step)
        ctx.low, ctx.high, ctx.axis = float(qmin), float(qmax), axis
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, out, multiplier, step = ctx.saved_tensors
        axis = ctx.axis
        inside = _pass_between(grad, torch.mul(weight, _along(multiplier, weight, axis)), ctx.low, ctx.high)
        dmultiplier = dstep = None
        if ctx.needs_input_grad[1]:
            per_channel = _inner(inside, weight, _per_channel(multiplier, weight, axis), axis) * step
            dmultiplier = per_channel if multiplier.dim() else per_channel.sum()
        if ctx.needs_input_grad[2]:
            dstep = _inner(grad, out, step, axis) / step
        dweight = inside.mul_(_along(multiplier * step, weight, axis)) if ctx.needs_input_grad[0] else None
        return dweight, dmultiplier, dstep, None, None, None


def _per_channel(parameter: Tensor, weight: Tensor, axis: int) -> Tensor:
    return parameter.expand(weight.shape[axis])
