"""The weight of a layer in training, as one operation: its scales, batch norm folded in, rounding, and the bias.

Values and gradients are those of the expressions in `hf_qat.quantization.layers`, which autograd would follow one by
one: on a CPU, arithmetic on a few numbers for each channel would take as long as that on the weight itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.folding import rounded_weight, saved_weight, weight_gradients
from hf_qat.quantization.kernels import fuses
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.kernels.folding import SMALLEST_FACTOR, FoldCall, Folding, Norm
from hf_qat.quantization.transforms import once_differentiable, refuse_transforms


def fold_layer(
    weight: Tensor, log2_scale: Tensor, norm: Norm | None, folding: Folding
) -> tuple[Tensor, Tensor | None]:
    """The fake-quantized weight, a batch norm folded in, and its bias, `None` without a batch norm or with a live one.

    Gradients reach the weight, `log2_scale`, gamma, beta and the layer's bias; the last three only if not `live`.
    Where Triton runs, one kernel each way computes it all.

    Args:
        weight: any shape and layout, float32.
        log2_scale: () or (C,) float32.
        norm: what is folded in, if anything.
        folding: the rest.
    """
    refuse_transforms()
    if fuses(weight):
        from hf_qat.quantization.kernels.weight import fused_fold

        return fused_fold(weight, log2_scale, norm, folding)
    if _compiles(weight, log2_scale, norm):
        from hf_qat.quantization.kernels.cpu.weight import compiled_fold

        return compiled_fold(weight, log2_scale, norm, folding)
    out, bias = _FoldLayer.apply(weight, log2_scale, *(norm or (None,) * 5), folding)
    return out, bias


def _compiles(weight: Tensor, log2_scale: Tensor, norm: Norm | None) -> bool:
    present = [tensor for tensor in norm or () if tensor is not None]
    return compiles(weight, log2_scale, *present)


def fold_together(calls: Sequence[FoldCall]) -> list[tuple[Tensor, Tensor | None]]:
    """`fold_layer` of each of `calls`, on a GPU where Triton runs; a launch each way for all that are of a kind."""
    from hf_qat.quantization.kernels.weights_together import fused_fold_together

    refuse_transforms()
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    for kind in dict.fromkeys(call.kind() for call in calls):
        places = [place for place, call in enumerate(calls) if call.kind() == kind]
        found.update(zip(places, fused_fold_together([calls[place] for place in places]), strict=True))
    return [found[place] for place in range(len(calls))]


class _FoldLayer(torch.autograd.Function):
    """Saves the weight, its rounded self (or the codes), and up to four numbers for each channel."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log2_scale: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        bias: Tensor | None,
        folding: Folding,
    ) -> tuple[Tensor, Tensor | None]:
        step = torch.exp2(log2_scale.round() if folding.power_of_two else log2_scale)
        multiplier = inverse = shift = factor = folded = None
        if mean is not None and variance is not None:
            inverse = torch.rsqrt(variance + folding.eps)
            factor = inverse if gamma is None else gamma * inverse
            if folding.live:
                factor = torch.where(factor.abs() < SMALLEST_FACTOR, SMALLEST_FACTOR, factor)
            multiplier = factor / step
            if folding.live:
                step = step / factor
            else:
                shift = mean if bias is None else mean - bias
                folded = -shift * factor if beta is None else torch.addcmul(beta, shift, factor, value=-1.0)
        out, kept = rounded_weight(weight, multiplier, step, folding.qmin, folding.qmax, folding.axis)
        by_scale = log2_scale.requires_grad
        ctx.save_for_backward(weight, kept if by_scale else None, multiplier, step, inverse, shift, factor)
        ctx.folding, ctx.shared = folding, log2_scale.dim() == 0
        return out, folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, bias_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, kept, multiplier, step, inverse, shift, factor = ctx.saved_tensors
        folding: Folding = ctx.folding
        _, by_scale, _, _, by_gamma, by_beta, by_bias, _ = ctx.needs_input_grad
        saved = saved_weight(weight, kept, multiplier, step, float(folding.qmin), float(folding.qmax), folding.axis)
        dweight, passed, rounded = weight_gradients(grad, saved, multiplier is not None and (by_scale or by_gamma))
        dscale = dgamma = dbeta = dbias = None
        if by_scale and rounded is not None:
            change = rounded if passed is None else torch.addcmul(rounded, passed, multiplier * step, value=-1.0)
            dscale = change * math.log(2.0)
            dscale = dscale.sum() if ctx.shared else dscale
        if not folding.live and bias_grad is not None:
            if by_gamma and passed is not None:
                dgamma = torch.addcmul(passed, bias_grad, shift, value=-1.0).mul_(inverse)
            dbeta = bias_grad if by_beta else None
            dbias = bias_grad * factor if by_bias else None
        return dweight, dscale, None, None, dgamma, dbeta, dbias, None
