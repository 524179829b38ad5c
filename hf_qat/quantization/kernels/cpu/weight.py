"""One pass each way over the weight of a layer: batch norm folded in, quantized per channel, and the bias with it.

The expressions are those of `hf_qat.quantization.layer_folding`, and so are the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.kernels.cpu.calls import FoldBackwardCall, FoldCall
from hf_qat.quantization.kernels.cpu.loops import CHUNK, FOLD, FOLD_BACKWARD
from hf_qat.quantization.kernels.cpu.threads import run
from hf_qat.quantization.kernels.folding import Folding, Norm
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like, without_gaps
from hf_qat.quantization.saved_codes import compute_again
from hf_qat.quantization.transforms import once_differentiable


def compiled_fold(
    weight: Tensor, log2_scale: Tensor, norm: Norm | None, folding: Folding
) -> tuple[Tensor, Tensor | None]:
    """See `fold_layer`, which calls it where the loops can be used."""
    out, bias = _CompiledFold.apply(weight, log2_scale, *(norm or (None,) * 5), folding)
    return out, bias


class _CompiledFold(torch.autograd.Function):
    """Saves the weight and the tensors that it is folded with; statistics as they are now, if they are live.

    What it puts out is computed again for whoever needs it in backward.
    """

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
        weight, out = in_memory_order(weight)
        mean, variance, gamma, beta, bias = without_gaps(mean, variance, gamma, beta, bias)
        scale = torch.exp2(log2_scale.round() if folding.power_of_two else log2_scale)
        folded = None
        if variance is not None and folding.live:
            variance = variance.clone()  # the batch norm that follows moves it before backward
            mean = bias = None
        elif variance is not None:
            folded = weight.new_empty(weight.shape[folding.axis])
        tensors = weight, scale, variance, gamma, mean, bias
        _fold(tensors, folding, out, beta, folded)
        compute_again(out, _folded, folding, weight, scale, variance, gamma)
        ctx.save_for_backward(weight, variance, gamma, mean, bias)
        ctx.scale, ctx.folding = scale, folding
        ctx.set_materialize_grads(False)
        return out, folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, bias_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, *norm = ctx.saved_tensors  # once: hooks of gradient checkpointing allow no more
        scale, variance = ctx.scale, norm[0]
        _, by_scale, _, _, by_gamma, by_beta, by_bias, _ = ctx.needs_input_grad
        grad = torch.zeros_like(weight) if grad is None else laid_out_like(grad, weight)
        folds = variance is not None and not ctx.folding.live
        bias_grad = bias_grad.contiguous() if folds and bias_grad is not None else None
        dweight, channels = torch.empty_like(weight), weight.shape[ctx.folding.axis]
        dscale = weight.new_empty(channels)
        dgamma, dbias = (torch.empty_like(dscale) if folds and wanted else None for wanted in (by_gamma, by_bias))
        gradients = (grad, bias_grad, dweight, dscale, dgamma, dbias)
        call = FoldBackwardCall(*_told((weight, scale, *norm), ctx.folding), *_addresses(gradients))
        run(FOLD_BACKWARD, call, _chunks(call))
        summed = None if not by_scale else dscale if scale.dim() else dscale.sum()
        return dweight, summed, None, None, dgamma, bias_grad if by_beta else None, dbias, None


def _folded(folding: Folding, weight: Tensor, scale: Tensor, variance: Tensor | None, gamma: Tensor | None) -> Tensor:
    """The rounded weight alone."""
    out = torch.empty_like(weight)
    _fold((weight, scale, variance, gamma, None, None), folding, out, None, None)
    return out


def _fold(
    tensors: Sequence[Tensor | None], folding: Folding, out: Tensor, beta: Tensor | None, folded: Tensor | None
) -> None:
    """Write the rounded weight into `out`, and its bias into `folded`, if given; `tensors`: as of `_told`."""
    call = FoldCall(*_told(tensors, folding), *_addresses((beta, out, folded)))
    run(FOLD, call, _chunks(call))


def _told(tensors: Sequence[Tensor | None], folding: Folding) -> tuple[int | float, ...]:
    """What both loops are told first; `tensors`: weight, scale, variance, gamma, mean and bias."""
    weight, scale, *_ = tensors
    assert weight is not None and scale is not None
    channels = weight.shape[folding.axis]
    length = weight.numel() // max(1, channels)
    inner = min(weight.stride(folding.axis), length)  # the stride of a single channel says nothing
    return (
        0, channels, length, inner, max(1, CHUNK // max(1, length)), scale.dim(), folding.live,
        *_addresses(tensors), folding.qmin, folding.qmax, folding.eps,
    )  # fmt: skip


def _chunks(call: Any) -> int:
    return -(-int(call.channels) // int(call.together))


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]
