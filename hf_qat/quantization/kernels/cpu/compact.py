"""One pass each way where bytes are kept in place of tensors; see `hf_qat.quantization.residuals`."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from hf_qat.quantization.kernels.cpu.activation import total
from hf_qat.quantization.kernels.cpu.calls import CompactBackwardCall, CompactCall, ExpandCall
from hf_qat.quantization.kernels.cpu.loops import COMPACT, COMPACT_BACKWARD, EXPAND, chunks_of
from hf_qat.quantization.kernels.cpu.threads import run
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like


class Compact(NamedTuple):
    """What a quantizer puts out, its codes, and how each value was rounded, if that was asked for, laid out alike."""

    out: Tensor
    codes: Tensor
    residuals: Tensor | None


class CompactGradients(NamedTuple):
    """Gradient of the input, and sums: of the gradient times the residual, inside and outside, and of it outside."""

    dx: Tensor
    moved: float
    ends: float
    outside: float


def quantize_compactly(
    x: Tensor, step: Tensor, low: float, high: float, shift: float, bytes_of: tuple[int, int] | None
) -> Compact:
    """`quantize` of `activation`, and bytes.

    Args:
        x, step, low, high: as there.
        shift: what codes are moved by into an int8.
        bytes_of: spread and amplitude of residuals, see `ByteRange`; `None` if nobody will ask for them.
    """
    x, out = in_memory_order(x)
    codes = torch.empty_like(x, dtype=torch.int8)
    residuals = None if bytes_of is None else torch.empty_like(codes)
    spread, amplitude = bytes_of or (0, 0)
    count, size = x.numel(), float(step)
    call = CompactCall(
        0, count, x.data_ptr(), out.data_ptr(), codes.data_ptr(), 0 if residuals is None else residuals.data_ptr(),
        size, low, high, low * size, high * size, shift, spread, amplitude,
    )  # fmt: skip
    run(COMPACT, call, chunks_of(count))
    return Compact(out, codes, residuals)


def compact_backward(grad: Tensor, residuals: Tensor, lowest: float, highest: float) -> CompactGradients:
    """The gradients, by residuals: what lies between `lowest` and `highest` passes."""
    grad = laid_out_like(grad, residuals)
    dx, count = torch.empty_like(grad), grad.numel()
    chunks = chunks_of(count)
    sums = [array("f", bytes(4 * chunks)) for _ in range(3)]
    addresses = (residuals.data_ptr(), grad.data_ptr(), dx.data_ptr(), *(each.buffer_info()[0] for each in sums))
    run(COMPACT_BACKWARD, CompactBackwardCall(0, count, *addresses, lowest, highest), chunks)
    return CompactGradients(dx, *map(total, sums))


def expand(codes: Tensor, shift: float, step: Tensor) -> Tensor:
    """`(codes + shift) * step`, float32, laid out as `codes`, which are int8 without gaps."""
    out, count = torch.empty_like(codes, dtype=torch.float32), codes.numel()
    call = ExpandCall(0, count, codes.data_ptr(), out.data_ptr(), shift, float(step))
    run(EXPAND, call, chunks_of(count))
    return out
