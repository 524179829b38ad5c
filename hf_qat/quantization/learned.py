"""Fake quantization by what an optimizer trains: the logarithm of a scale, and an offset in units of the whole range.

LSQ (Esser et al. 2020, eq. 3) and LSQ+ (Bhalgat et al. 2020, eq. 4-6) by the chain rule, in one operation: spread over
the graph, the arithmetic on single numbers takes longer than the quantizing of a small tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import round_as_dtype
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.learned_gradients import QuantizerValues, gradients
from hf_qat.quantization.saved_codes import keep_inputs, keeps_inputs
from hf_qat.quantization.transforms import once_differentiable


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
        from hf_qat.quantization.kernels.cpu.learned import compiled_fake_quantize

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
