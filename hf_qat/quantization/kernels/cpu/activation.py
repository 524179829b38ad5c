"""One pass each way over a tensor with one scale, with the gradients of `hf_qat.quantization.learned`."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from hf_qat.quantization.kernels.cpu.calls import QuantizeBackwardCall, QuantizeCall
from hf_qat.quantization.kernels.cpu.loops import QUANTIZE, QUANTIZE_BACKWARD, chunks_of
from hf_qat.quantization.kernels.cpu.threads import run
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like


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
    return Gradients(dx, total(sums[:chunks]), total(sums[chunks:]))


def total(sums: Iterable[float]) -> float:
    """The sum, NaN of infinities of both signs."""
    try:
        return math.fsum(sums)
    except ValueError:
        return math.nan
