"""`hf_qat.quantization.learned` by one pass each way."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import pass_inside
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.kernels.cpu.activation import quantize, quantize_backward
from hf_qat.quantization.learned_gradients import QuantizerValues, gradients
from hf_qat.quantization.saved_codes import keep_inputs
from hf_qat.quantization.transforms import once_differentiable


CPU = torch.device("cpu")


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
            offset = None if offset is None else _float32(offset)
            return *gradients(grad, x, offset, None, values, wanted), None
        if not (wanted[1] or wanted[2]):
            return pass_inside(grad, x, values.scale, values.low, values.high), None, None, None
        dx, changed, outside = quantize_backward(grad, x, step, values.low, values.high)
        dlog2 = doffset = None
        if wanted[1]:
            unlimited = float(values.unlimited_scale)
            ratio = 1.0 if unlimited == step else unlimited / step  # both may have vanished
            dlog2 = _float32(changed * math.log(2.0) * ratio)
        if wanted[2]:
            gradient = -outside * step * values.span
            away = (offset - min(max(offset, 0.0), 1.0)) * gradient < 0.0
            doffset = _float32(0.0 if away else gradient)
        return dx if wanted[0] else None, dlog2, doffset, None


def _float32(number: float) -> Tensor:
    """(), infinite where `number` is too large: whoever scales gradients (`GradScaler`) looks for that."""
    return torch.scalar_tensor(ctypes.c_float(number).value, dtype=torch.float32, device=CPU)
