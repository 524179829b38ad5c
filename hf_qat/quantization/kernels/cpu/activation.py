"""One pass each way over a tensor with one scale, with the gradients of `hf_qat.quantization.learned`."""

from __future__ import annotations

import math
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_qat.quantization.fake_quantize import pass_inside
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.kernels.cpu.calls import QuantizeBackwardCall, QuantizeCall
from hf_qat.quantization.kernels.cpu.loops import QUANTIZE, QUANTIZE_BACKWARD, chunks_of
from hf_qat.quantization.kernels.cpu.threads import run
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like
from hf_qat.quantization.learned import QuantizerValues, gradients
from hf_qat.quantization.saved_codes import keep_inputs


class Gradients(NamedTuple):
    """What comes back through a quantizer.

    Attributes:
        dx: the gradient where the input lies between the lowest and the highest value, 0 elsewhere.
        changed: the sum of the gradient times what rounding (inside) or clamping to a value (outside) comes to.
        outside: the sum of the gradient where the input lies outside.
    """

    dx: Tensor
    changed: float
    outside: float


def quantize(x: Tensor, step: float, low: float, high: float) -> Tensor:
    """`clamp(round(x / step), low, high) * step`, without gradients.

    Args:
        x: any shape and layout, float32.
        step: a float32.
        low, high: whole numbers.

    Returns:
        The shape and layout of `x`.
    """
    x, out = in_memory_order(x)
    count = x.numel()
    call = QuantizeCall(0, count, x.data_ptr(), out.data_ptr(), step, low, high)
    run(QUANTIZE, call, chunks_of(count))
    return out


def quantize_backward(grad: Tensor, x: Tensor, step: float, low: float, high: float) -> Gradients:
    """The gradients of `quantize`; sums are the same in every run, with any number of threads."""
    x, dx = in_memory_order(x)
    grad = laid_out_like(grad, x)
    count = x.numel()
    chunks = chunks_of(count)
    sums = array("f", bytes(2 * 4 * chunks))
    changed = sums.buffer_info()[0]
    call = QuantizeBackwardCall(
        0, count, x.data_ptr(), grad.data_ptr(), dx.data_ptr(), changed, changed + 4 * chunks,
        step, low, high, low * step, high * step,
    )  # fmt: skip
    run(QUANTIZE_BACKWARD, call, chunks)
    return Gradients(dx, math.fsum(sums[:chunks]), math.fsum(sums[chunks:]))


def compiled_fake_quantize(x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues) -> Tensor:
    """See `learned_fake_quantize`, which calls it where the loops can be used."""
    out: Tensor = _Compiled.apply(x, log2_scale, offset, values)
    return out


class _Compiled(torch.autograd.Function):
    """Saves its input, as it came; of the parameters, numbers are enough."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues) -> Tensor:
        arguments = x, float(values.scale), values.low, values.high
        ctx.save_for_backward(x)
        ctx.values, ctx.step, ctx.offset = values, arguments[1], None if offset is None else offset.item()
        return keep_inputs(quantize(*arguments), quantize, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        values, step, offset, wanted = ctx.values, ctx.step, ctx.offset, ctx.needs_input_grad
        if not compiles(grad):
            offset = None if offset is None else torch.scalar_tensor(offset)
            return *gradients(grad, x, offset, None, values, wanted), None
        if not (wanted[1] or wanted[2]):
            return pass_inside(grad, x, values.scale, values.low, values.high), None, None, None
        dx, changed, outside = quantize_backward(grad, x, step, values.low, values.high)
        dlog2 = doffset = None
        if wanted[1]:
            unlimited = float(values.unlimited_scale)
            ratio = 1.0 if unlimited == step else unlimited / step  # both may have vanished
            dlog2 = torch.scalar_tensor(changed * math.log(2.0) * ratio)
        if wanted[2]:
            gradient = -outside * step * values.span
            away = (offset - min(max(offset, 0.0), 1.0)) * gradient < 0.0
            doffset = torch.scalar_tensor(0.0 if away else gradient)
        return dx if wanted[0] else None, dlog2, doffset, None
