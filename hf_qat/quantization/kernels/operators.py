"""The gradient of a learned fake quantization as an operator, into which a compiler does not look.

The forward pass is a formula, for a compiler to fuse with what is around it. Backward is one kernel that reads the
gradient and the input once, for the gradient of the input and for both sums; compiled, the sums would be a pass of
their own, and more than the input would be kept for them.
"""

from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import round_as_dtype
from hf_qat.quantization.kernels.code_range import CodeRange
from hf_qat.quantization.learned_gradients import QuantizerValues
from hf_qat.quantization.transforms import once_differentiable


@torch.library.custom_op("hf_qat::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    log2_scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    power_of_two: bool,
    scale_limit: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of `x`, and that of `log2_scale` or, (2,), those of `log2_scale` and `offset`; see `CodeRange`."""
    from hf_qat.quantization.kernels.activation import quantize_backward
    from hf_qat.quantization.kernels.layout import in_memory_order

    codes = CodeRange(qmin, qmax, True, power_of_two, scale_limit)
    dx, sums = quantize_backward(grad, in_memory_order(x)[0], log2_scale, offset, codes, True, True)
    assert dx is not None and sums is not None
    return dx, sums


@fake_quantize_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    log2_scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    power_of_two: bool,
    scale_limit: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(1 if offset is None else 2, dtype=torch.float32)


def traced_fake_quantize(
    x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues, codes: CodeRange
) -> Tensor:
    """`learned_fake_quantize` for a compiler; `values` and `codes` say the same, as tensors and as numbers."""
    out: Tensor = _Traced.apply(x, log2_scale, offset, values, codes)
    return out


class _Traced(torch.autograd.Function):
    """Saves its input, as it came, and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log2_scale: Tensor, offset: Tensor | None, values: QuantizerValues, codes: CodeRange
    ) -> Tensor:
        ctx.save_for_backward(x, log2_scale, offset)
        ctx.codes = codes
        return round_as_dtype(x, values.scale, values.low, values.high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, log2_scale, offset = ctx.saved_tensors
        qmin, qmax, _, power_of_two, limit = ctx.codes
        dx, sums = fake_quantize_backward(grad, x, log2_scale, offset, qmin, qmax, power_of_two, limit)
        return dx, sums[0], None if offset is None else sums[1], None, None
