"""The fake-quantize operation and its gradients, bit-compatible with ONNX `QuantizeLinear` / `DequantizeLinear`.

Straight-through estimator: Bengio et al. 2013.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.kernels import fuses
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.transforms import once_differentiable, refuse_forward_mode, refuse_transforms


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
    codes = torch.div(x, along(scale, x, axis)).round_()
    if zero_point is not None:
        codes.add_(along(zero_point, x, axis))
    return codes.clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None = None) -> Tensor:
    """Real numbers `(codes - zero_point) * scale`, float32, the shape of `codes`."""
    centred = codes.to(torch.float32)
    if zero_point is not None:
        centred = centred - along(zero_point, codes, axis)
    return centred * along(scale, codes, axis)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """`dequantize(quantize(x))`; the gradient passes straight through where `x` lies between the ends of the range.

    Scale and zero point get no gradient here, see `learned.py`; a weight and its scale per channel, see `folding.py`.

    Args:
        x, scale, zero_point, qmin, qmax, axis: as in `quantize`; `zero_point` may be fractional, and is rounded.

    Returns:
        Same shape and dtype as `x`; computed in float32.
    """
    if axis is None and scale.dim() == 0 and fuses(x):
        refuse_forward_mode()
        from hf_qat.quantization.kernels.activation import fused_fake_quantize
        from hf_qat.quantization.kernels.code_range import CodeRange

        return fused_fake_quantize(x, scale.detach(), zero_point, CodeRange(qmin, qmax, logarithmic=False))
    low, high = code_bounds(zero_point, x, qmin, qmax, axis)
    step = along(scale.detach(), x, axis)
    if x.requires_grad and torch.is_grad_enabled():
        refuse_transforms()
        out: Tensor = _FakeQuantize.apply(x, step, low, high)
        return out
    refuse_forward_mode()
    return round_as_dtype(x, step, low, high)


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """View a (C,) tensor so that it broadcasts along `axis` of `x`."""
    if parameter.dim() == 0 or axis is None:
        return parameter
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.view(shape)


def code_bounds(zero_point: Tensor | None, x: Tensor, qmin: int, qmax: int, axis: int | None) -> tuple[Bound, Bound]:
    """`qmin - zero_point` and `qmax - zero_point`: numbers where reading them costs nothing, else tensors."""
    if zero_point is None:
        return float(qmin), float(qmax)
    if is_cheap(zero_point):
        zero = float(round(float(zero_point.detach())))  # half to even, as torch does
        return qmin - zero, qmax - zero
    zeros = along(zero_point.detach().round(), x, axis)
    return qmin - zeros, qmax - zeros


def is_cheap(parameter: Tensor) -> bool:
    """Whether reading its value makes nobody wait; a compiler would have to stop for it."""
    return parameter.dim() == 0 and parameter.device.type == "cpu" and not torch.compiler.is_compiling()


def round_to_codes(x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
    """`clamp(round(x / step), low, high) * step`, in float32.

    One new tensor and three passes over it while it is in cache: to fill a second one would cost as much again. Not so
    where a compiler fuses them; and traced by that of torch 2.11, an `autograd.Function` whose output was last written
    to in place loses its gradient, without a word.
    """
    if torch.compiler.is_compiling():
        return torch.div(x.float(), step).round().clamp(low, high) * step
    return torch.div(x.float(), step).round_().clamp_(low, high).mul_(step)


def round_as_dtype(x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
    """`round_to_codes`, in the dtype of `x`."""
    if step.dim() == 0 and compiles(x, step) and not isinstance(low, Tensor):
        from hf_qat.quantization.kernels.cpu.activation import quantize as quantize_in_one_pass

        return quantize_in_one_pass(x, float(step), low, high)
    return as_dtype(round_to_codes(x, step, low, high), x.dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which is not called where it does nothing: see `round_to_codes` on torch 2.11."""
    return x if x.dtype == dtype else x.to(dtype)


def pass_inside(grad: Tensor, x: Tensor, step: Tensor, low: Bound, high: Bound, spent: Tensor | None = None) -> Tensor:
    """`grad` where `low * step < x < high * step`, else 0; one pass where the bounds are numbers.

    Not where `low < x / step < high`: of a value that was quantized before, to an end of the same range, the rounding
    of the division would decide. It is a new tensor, or written into `spent`, which has the sizes of `x`: a CPU takes
    longer to get new memory from the system than to write it.
    """
    if is_cheap(step) and not isinstance(low, Tensor):
        unit = float(step)
        bounds = low * unit, high * unit
        passed: Tensor
        if spent is None:
            passed = torch.ops.aten.hardtanh_backward.default(grad, x, *bounds)
        else:
            passed = torch.ops.aten.hardtanh_backward.grad_input(grad, x, *bounds, grad_input=spent)
        return passed
    return _where_between(grad, x, low * step, high * step)


def _where_between(grad: Tensor, y: Tensor, low: Bound, high: Bound) -> Tensor:
    """`grad` where `low < y < high`, else 0."""
    return torch.where((y > low) & (y < high), grad, grad.new_zeros(()))


def pass_between(grad: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    """`grad` where `low < y < high`, else 0, written over `y`: no mask, and no other tensor, is made.

    A compiler fuses the formula, and would stop at what is written into a view.
    """
    if torch.compiler.is_compiling():
        return _where_between(grad, y, low, high)
    passed: Tensor = torch.ops.aten.hardtanh_backward.grad_input(grad, y, low, high, grad_input=y)
    return passed


def flat(x: Tensor) -> Tensor:
    """All values of `x` as (n,), without a copy for any dense memory format such as channels_last."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """() `(a * b).sum()` of two tensors of one size; no copy is made where they lie in memory alike, without gaps."""
    if torch.compiler.is_compiling() or a.stride() != b.stride():
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return torch.dot(flat(a), flat(b))


class _FakeQuantize(torch.autograd.Function):
    """Saves its input, as it came; which values pass is found out again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.bounds = low, high
        return round_as_dtype(x, step, low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        return pass_inside(grad.float(), x.float(), step, *ctx.bounds).to(x.dtype), None, None, None
