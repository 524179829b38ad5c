"""Fake quantization that keeps one byte of each input for backward, in place of the input.

The byte says on which side of the range the value lay or, inside it, by how much rounding moved it: to 1/252 of a step
with 8 bits. Which gradients pass is exact by it, and so are the gradients of weights. Those of a learned scale are not
(see `hf_qat.quantization.learned`): the error is that of rounding the residual itself, 0.4 % of a sum of independent
values, far below what another batch changes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import as_dtype, pass_inside, sum_of_products
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.learned_gradients import QuantizerValues, offset_gradient
from hf_qat.quantization.saved_codes import byte_shift, keep_codes, to_byte
from hf_qat.quantization.transforms import once_differentiable


class ByteRange(NamedTuple):
    """How the codes of a quantizer, less its zero point, are written into an int8.

    Attributes:
        low, high: the lowest and the highest code there; they are on both sides of 0.
        spread: in the byte of a residual, how far codes are apart: its ends say that a value lay outside.
        amplitude: in that byte, half a step.
    """

    low: int
    high: int
    spread: int
    amplitude: int


def byte_range(span: int) -> ByteRange:
    """That of codes of which the highest is `span` above the lowest, 2 to 255."""
    below = (span + 1) // 2
    above = span - below
    spread = min(128 // below, 127 // above)
    return ByteRange(-below, above, spread, spread * above - 1)


def compact_fake_quantize(x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues) -> Tensor:
    """`learned_fake_quantize`, to the last bit but for the gradients of the parameters, which are near it.

    What it puts out has codes (`hf_qat.quantization.saved_codes`).

    Args:
        x, log2_scale, offset, values: as of `learned_fake_quantize`; 3 to 256 codes.
    """
    out: Tensor = _Compact.apply(x, log2_scale, offset, values)
    return out


class _Compact(torch.autograd.Function):
    """Saves a byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues) -> Tensor:
        step, low, high = values.scale, values.low, values.high
        shift = byte_shift(low, values.span)
        ctx.values, ctx.dtype = values, x.dtype
        if compiles(x) and not isinstance(shift, Tensor):
            return _in_one_pass(ctx, x, offset, values, shift)
        y = torch.div(x.float(), step)
        rounded = y.round().clamp_(low, high)
        codes, residuals = to_byte(rounded, shift), None
        if any(ctx.needs_input_grad):
            residuals = _residuals(y, rounded, x, values, shift)
        out = as_dtype(rounded.mul_(step), x.dtype)
        keep_codes(out, codes, shift, step)
        ctx.save_for_backward(residuals, offset)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        residuals, offset = ctx.saved_tensors
        values: QuantizerValues = ctx.values
        own = byte_range(values.span)
        lowest, highest = own.spread * own.low + 0.5, own.spread * own.high - 0.5
        by_parameters = any(ctx.needs_input_grad[1:3])
        moved: Any
        if compiles(grad):
            from hf_qat.quantization.kernels.cpu.compact import compact_backward

            dx, moved, ends, outside = compact_backward(grad, residuals, lowest, highest)
            ends -= outside * (own.spread * own.low)
        else:
            dx, moved, ends, outside = _sums(grad.float(), residuals.float(), lowest, highest, by_parameters)
        dlog2 = doffset = None
        if by_parameters:
            changed = ends / own.spread + outside * values.low - moved / (2 * own.amplitude)
            dlog2 = changed * values.unlimited_scale * math.log(2.0)
            if offset is not None:
                doffset = offset_gradient(
                    torch.as_tensor(-outside, dtype=torch.float32, device=offset.device), offset, values
                )
        return dx.to(ctx.dtype), dlog2, doffset, None


def _in_one_pass(ctx: Any, x: Tensor, offset: Tensor | None, values: QuantizerValues, shift: float) -> Tensor:
    """The same by a loop."""
    from hf_qat.quantization.kernels.cpu.compact import quantize_compactly

    own = byte_range(values.span)
    wanted = (own.spread, own.amplitude) if any(ctx.needs_input_grad) else None
    out, codes, residuals = quantize_compactly(x, values.scale, values.low, values.high, shift, wanted)
    keep_codes(out, codes, shift, values.scale)
    ctx.save_for_backward(residuals, offset)
    return out


def _sums(
    grad: Tensor, residuals: Tensor, lowest: float, highest: float, wanted: bool
) -> tuple[Tensor, Any, Any, Any]:
    """The gradient of the input, and the sums of `CompactGradients`, if they are wanted.

    In that of the ends, residuals count from that of the lowest code on: behind a ReLU, half of all values lie there,
    and the difference of two sums of them would cancel.
    """
    dx: Tensor = torch.ops.aten.hardtanh_backward(grad, residuals, lowest, highest)
    if not wanted:
        return dx, None, None, None
    outside = torch.sub(grad, dx)
    moved = sum_of_products(dx, residuals)
    return dx, moved, sum_of_products(outside, residuals.sub_(lowest - 0.5)), outside.sum()


def _residuals(y: Tensor, rounded: Tensor, x: Tensor, values: QuantizerValues, shift: float | Tensor) -> Tensor:
    """The bytes, int8, of `x`; they are written into `y`, which is `x / scale`, first.

    What is inside is masked by the very comparison of `pass_inside`, while the codes are taken off; added again, they
    are what the rest comes to.
    """
    own = byte_range(values.span)
    ends = torch.sub(rounded, shift)
    y.sub_(rounded).mul_(2 * own.amplitude).sub_(ends, alpha=own.spread)
    inside = pass_inside(y, x.float(), values.scale, values.low, values.high)
    return inside.add_(ends, alpha=own.spread).round_().to(torch.int8)
