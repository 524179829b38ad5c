# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""One kernel each way for a tensor with one scale, with the gradients of `hf_qat.quantization.learned`."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_qat.quantization.kernels.arithmetic import ROUNDING, divide, scale_of, to_codes
from hf_qat.quantization.kernels.code_range import CodeRange
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like
from hf_qat.quantization.transforms import once_differentiable


#: Elements that a program works on together.
BLOCK = 2048

#: Most programs that share a backward, a power of two: enough to fill a GPU, few enough to add up what they found in
#: one launch. As it does not depend on the GPU, neither do the sums.
PROGRAMS = 2048

#: log2 to natural logarithm.
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _parameters(
    scale_at,
    offset_at,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    LIMIT: tl.constexpr,
    LOGARITHMIC: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Scale before and after its limit, and the bounds of the codes less the zero point.

    `tl.minimum` and `tl.maximum` would make a number of NaN; so it stays, and of an offset becomes one of the scale,
    since a value that is compared with bounds of NaN is left as it is.
    """
    unlimited = tl.load(scale_at).to(tl.float32)
    if LOGARITHMIC:
        unlimited = scale_of(unlimited, POWER_OF_TWO)
    scale = unlimited
    if LIMIT > 0:
        scale = tl.where(unlimited > LIMIT, LIMIT, unlimited)
    zero = 0.0
    if offset_at is not None:
        zero = tl.load(offset_at).to(tl.float32)
        if LOGARITHMIC:
            zero = tl.where(zero < 0.0, 0.0, tl.where(zero > 1.0, 1.0, zero)) * (QMAX - QMIN) + QMIN
        zero = (zero + ROUNDING) - ROUNDING
        scale += zero * 0.0
    return unlimited, scale, QMIN - zero, QMAX - zero


@triton.jit
def _quantize(
    x_at,
    out_at,
    scale_at,
    offset_at,
    n,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    LIMIT: tl.constexpr,
    LOGARITHMIC: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, scale, low, high = _parameters(scale_at, offset_at, QMIN, QMAX, LIMIT, LOGARITHMIC, POWER_OF_TWO)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + index, mask=index < n).to(tl.float32)
    out = to_codes(divide(x, scale), low, high) * scale
    tl.store(out_at + index, out.to(out_at.dtype.element_ty), mask=index < n)


@triton.jit
def _quantize_backward(
    grad_at,
    x_at,
    dx_at,
    sums_at,
    scale_at,
    offset_at,
    n,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    LIMIT: tl.constexpr,
    LOGARITHMIC: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unlimited, scale, low, high = _parameters(scale_at, offset_at, QMIN, QMAX, LIMIT, LOGARITHMIC, POWER_OF_TWO)
    program, programs = tl.program_id(0), tl.num_programs(0)
    changed = tl.zeros((BLOCK,), tl.float32)
    outside = tl.zeros((BLOCK,), tl.float32)
    start = program.to(tl.int64) * BLOCK
    while start < n:  # Triton's interpreter takes no `range` that depends on an argument
        index = start + tl.arange(0, BLOCK)
        x = tl.load(x_at + index, mask=index < n, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + index, mask=index < n, other=0.0).to(tl.float32)
        inside = (x > low * scale) & (x < high * scale)  # as `pass_inside`
        if dx_at is not None:
            tl.store(dx_at + index, tl.where(inside, grad, 0.0).to(dx_at.dtype.element_ty), mask=index < n)
        if sums_at is not None:
            changed += grad * (to_codes(divide(x, scale), low, high) * scale - tl.where(inside, x, 0.0))
            outside += tl.where(inside, 0.0, grad)
        start += programs * BLOCK
    if sums_at is not None:
        tl.store(sums_at + program, tl.sum(changed) * (LN2 * divide(unlimited, scale)))
        if offset_at is not None:
            tl.store(sums_at + programs + program, -tl.sum(outside) * scale * (QMAX - QMIN))


@triton.jit
def _add_up(sums_at, out_at, offset_at, programs, BLOCK: tl.constexpr):
    """What all programs found; nothing leads an offset further away from [0, 1]."""
    index = tl.arange(0, BLOCK)
    tl.store(out_at, tl.sum(tl.load(sums_at + index, mask=index < programs, other=0.0)))
    moved = tl.sum(tl.load(sums_at + programs + index, mask=index < programs, other=0.0))
    offset = tl.load(offset_at).to(tl.float32)
    beyond = tl.where(offset < 0.0, offset, tl.where(offset > 1.0, offset - 1.0, 0.0))
    tl.store(out_at + 1, tl.where(beyond * moved < 0.0, 0.0, moved))  # a step goes against the gradient


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, codes: CodeRange) -> Tensor:
    """`clamp(round(x / scale), low, high) * scale`, without gradients.

    Args:
        x: any shape, layout and float type; computed in float32.
        scale, offset: () float32, on the device of `x`: what `codes.logarithmic` says.
        codes: the rest of the quantizer.

    Returns:
        The shape, layout and dtype of `x`.
    """
    return _quantized(*in_memory_order(x), scale, offset, codes)


def _quantized(x: Tensor, out: Tensor, scale: Tensor, offset: Tensor | None, codes: CodeRange) -> Tensor:
    n = x.numel()
    if n:
        with torch.cuda.device_of(x):
            _quantize[(_blocks(n),)](x, out, scale, offset, n, *_numbers(codes), BLOCK=BLOCK)
    return out


def quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, codes: CodeRange, wants_x: bool, wants_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of `x`, and (2,) float32, those of `log2_scale` and `offset`, if wanted; the same in every run."""
    dx = torch.empty_like(x) if wants_x else None
    grad, n = laid_out_like(grad, x), x.numel()
    programs = max(1, min(PROGRAMS, _blocks(n)))
    rows = 1 if offset is None else 2
    sums = torch.empty(rows, programs, dtype=torch.float32, device=x.device) if wants_sums else None
    with torch.cuda.device_of(x):
        _quantize_backward[(programs,)](grad, x, dx, sums, scale, offset, n, *_numbers(codes), BLOCK=BLOCK)
        if sums is None or offset is None:
            return dx, None if sums is None else sums.sum(1)
        both = torch.empty(2, dtype=torch.float32, device=x.device)
        _add_up[(1,)](sums, both, offset, programs, BLOCK=PROGRAMS)
    return dx, both


def _blocks(n: int) -> int:
    """How many hold `n` values; Triton's own function for it takes as long as a launch."""
    return -(-n // BLOCK)


def _numbers(codes: CodeRange) -> tuple[float, float, float, bool, bool]:
    """What a kernel is compiled for. A limit of 0 is none: `inf` would be a name where a compiler writes it down."""
    limit = 0.0 if math.isinf(codes.scale_limit) else codes.scale_limit
    return float(codes.qmin), float(codes.qmax), limit, codes.logarithmic, codes.power_of_two


def fused_fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, codes: CodeRange) -> Tensor:
    """`quantize` with the straight-through gradient of `x`, and those of `scale` and `offset` if logarithmic."""
    if not torch.is_grad_enabled():
        return quantize(x, scale, offset, codes)
    out: Tensor = _FusedFakeQuantize.apply(x, scale, offset, codes)
    return out


class _FusedFakeQuantize(torch.autograd.Function):
    """Saves its input, as it came, and two numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, codes: CodeRange) -> Tensor:
        x, out = in_memory_order(x)
        ctx.save_for_backward(x, scale, offset)
        ctx.codes = codes
        return _quantized(x, out, scale, offset, codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset = ctx.saved_tensors
        by_x, by_scale, by_offset, _ = ctx.needs_input_grad
        dx, sums = quantize_backward(grad, x, scale, offset, ctx.codes, by_x, by_scale or by_offset)
        dscale = sums[0] if sums is not None and by_scale else None
        doffset = sums[1] if sums is not None and by_offset else None
        return dx, dscale, doffset, None
