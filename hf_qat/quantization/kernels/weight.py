# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""One kernel each way for the weight of a layer: batch norm folded in, quantized per channel, and the bias with it.

The expressions are those of `hf_qat.quantization.layer_folding`, and so are the gradients.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_qat.quantization.kernels.arithmetic import divide, scale_of, to_codes
from hf_qat.quantization.kernels.folding import SMALLEST_FACTOR as SMALLEST
from hf_qat.quantization.kernels.folding import Folding, Norm
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like, without_gaps
from hf_qat.quantization.transforms import once_differentiable


#: Values of a channel that a program works on together: the least of these that holds them all, or the last.
BLOCKS = (64, 256, 1024)

SMALLEST_FACTOR = tl.constexpr(SMALLEST)

LN2 = tl.constexpr(math.log(2.0))

#: Rows of what forward keeps per channel.
FACTOR, INVERSE, SHIFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

#: Rows of the gradients per channel.
BY_SCALE, BY_GAMMA, BY_BETA, BY_BIAS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _place(c, start, channels, inner, BLOCK: tl.constexpr):
    """Where the values `start` to `start + BLOCK` of channel `c` lie: in runs of `inner`, one of each channel."""
    j = start + tl.arange(0, BLOCK)
    return j, (j // inner) * (channels * inner) + c * inner + j % inner


@triton.jit
def _factor(variance_at, gamma_at, c, eps, LIVE: tl.constexpr):
    """1 / sigma and gamma / sigma of a channel; the latter is not 0 where it will be divided by."""
    inverse = tl.rsqrt(tl.load(variance_at + c) + eps)
    factor = inverse
    if gamma_at is not None:
        factor = tl.load(gamma_at + c) * inverse
    if LIVE:
        factor = tl.where(tl.abs(factor) < SMALLEST_FACTOR, SMALLEST_FACTOR, factor)
    return inverse, factor


@triton.jit
def _multiplier_and_step(scale, factor, LIVE: tl.constexpr):
    """What a weight is multiplied by to be in steps, and the size of a step of what comes out."""
    step = scale
    if LIVE:
        step = divide(scale, factor)
    return divide(factor, scale), step


@triton.jit
def _in_steps(w, multiplier, FOLDS: tl.constexpr):
    """A weight in steps; without a batch norm, `multiplier` is what it is divided by."""
    if FOLDS:
        y = w * multiplier
    else:
        y = divide(w, multiplier)
    return y


@triton.jit
def _fold_bias(bias_out_at, kept_at, mean_at, beta_at, bias_at, inverse, factor, c, row, rows):
    """Store the bias of a channel, and what its gradients need."""
    shift = tl.load(mean_at + c)
    if bias_at is not None:
        shift = shift - tl.load(bias_at + c)
    folded = -shift * factor
    if beta_at is not None:
        folded = tl.load(beta_at + c) + folded
    tl.store(bias_out_at + row, folded.to(bias_out_at.dtype.element_ty))
    tl.store(kept_at + INVERSE * rows + row, inverse)
    tl.store(kept_at + SHIFT * rows + row, shift)


@triton.jit
def fold_channel(
    w_at, out_at, log2_scale_at, kept_at, bias_out_at, mean_at, variance_at, gamma_at, beta_at, bias_at, eps,
    qmin, qmax, c, channels, length, inner, row, rows,
    PER_CHANNEL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channel `c` of a layer; what there is one of for each channel is number `row` of `rows`."""
    scale = scale_of(tl.load(log2_scale_at + (c if PER_CHANNEL else 0)), POWER_OF_TWO)
    multiplier, step = scale, scale
    if variance_at is not None:
        inverse, factor = _factor(variance_at, gamma_at, c, eps, LIVE)
        multiplier, step = _multiplier_and_step(scale, factor, LIVE)
        tl.store(kept_at + FACTOR * rows + row, factor)
        if not LIVE:
            _fold_bias(bias_out_at, kept_at, mean_at, beta_at, bias_at, inverse, factor, c, row, rows)
    start = 0
    while start < length:
        j, place = _place(c, start, channels, inner, BLOCK)
        w = tl.load(w_at + place, mask=j < length, other=0.0).to(tl.float32)
        out = to_codes(_in_steps(w, multiplier, variance_at is not None), qmin, qmax) * step
        tl.store(out_at + place, out.to(out_at.dtype.element_ty), mask=j < length)
        start += BLOCK


@triton.jit
def _fold(
    w_at, out_at, log2_scale_at, kept_at, bias_out_at, mean_at, variance_at, gamma_at, beta_at, bias_at, eps,
    qmin, qmax, channels, length, inner,
    PER_CHANNEL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each channel."""
    c = tl.program_id(0)
    fold_channel(
        w_at, out_at, log2_scale_at, kept_at, bias_out_at, mean_at, variance_at, gamma_at, beta_at, bias_at, eps,
        qmin, qmax, c, channels, length, inner, c, channels, PER_CHANNEL, POWER_OF_TWO, LIVE, BLOCK,
    )  # fmt: skip


@triton.jit
def _bias_backward(bias_grad_at, sums_at, kept_at, passed, factor, c, row, rows):
    """Store the gradients of gamma, beta and the layer's bias; `passed`: the sum of weights times their gradients."""
    inverse = tl.load(kept_at + INVERSE * rows + row)
    shift = tl.load(kept_at + SHIFT * rows + row)
    grad = tl.load(bias_grad_at + c).to(tl.float32)
    tl.store(sums_at + BY_GAMMA * rows + row, (passed - grad * shift) * inverse)
    tl.store(sums_at + BY_BETA * rows + row, grad)
    tl.store(sums_at + BY_BIAS * rows + row, grad * factor)


@triton.jit
def fold_channel_backward(
    grad_at, bias_grad_at, w_at, dw_at, sums_at, log2_scale_at, kept_at,
    qmin, qmax, c, channels, length, inner, row, rows,
    PER_CHANNEL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the weights of channel `c`, and the sums for its parameters; see `fold_channel`."""
    scale = scale_of(tl.load(log2_scale_at + (c if PER_CHANNEL else 0)), POWER_OF_TWO)
    multiplier, step, factor, slope = scale, scale, 1.0, 1.0
    if kept_at is not None:
        factor = tl.load(kept_at + FACTOR * rows + row)
        multiplier, step = _multiplier_and_step(scale, factor, LIVE)
        slope = multiplier * step
    changed = tl.zeros((BLOCK,), tl.float32)
    passed = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < length:
        j, place = _place(c, start, channels, inner, BLOCK)
        w = tl.load(w_at + place, mask=j < length, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + place, mask=j < length, other=0.0).to(tl.float32)
        y = _in_steps(w, multiplier, kept_at is not None)
        inside = (y > qmin) & (y < qmax)
        dy = tl.where(inside, grad, 0.0)
        changed += grad * (to_codes(y, qmin, qmax) - tl.where(inside, y, 0.0))
        passed += dy * w
        tl.store(dw_at + place, (dy * slope).to(dw_at.dtype.element_ty), mask=j < length)
        start += BLOCK
    tl.store(sums_at + BY_SCALE * rows + row, tl.sum(changed) * (step * LN2))
    if bias_grad_at is not None:
        _bias_backward(bias_grad_at, sums_at, kept_at, tl.sum(passed), factor, c, row, rows)


@triton.jit
def _fold_backward(
    grad_at, bias_grad_at, w_at, dw_at, sums_at, log2_scale_at, kept_at,
    qmin, qmax, channels, length, inner,
    PER_CHANNEL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each channel."""
    c = tl.program_id(0)
    fold_channel_backward(
        grad_at, bias_grad_at, w_at, dw_at, sums_at, log2_scale_at, kept_at,
        qmin, qmax, c, channels, length, inner, c, channels, PER_CHANNEL, POWER_OF_TWO, LIVE, BLOCK,
    )  # fmt: skip


def fused_fold(
    weight: Tensor, log2_scale: Tensor, norm: Norm | None, folding: Folding
) -> tuple[Tensor, Tensor | None]:
    """See `fold_layer`, which calls it where Triton runs."""
    out, bias = _FusedFold.apply(weight, log2_scale, *(norm or (None,) * 5), folding)
    return out, bias


class _FusedFold(torch.autograd.Function):
    """Saves the weight and three numbers per channel: running statistics move before backward, if they are live."""

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
        weight, like = in_memory_order(weight)
        log2_scale, mean, variance, gamma, beta, bias = without_gaps(log2_scale, mean, variance, gamma, beta, bias)
        out = like if like.dtype == folding.dtype else torch.empty_like(weight, dtype=folding.dtype)
        channels = weight.shape[folding.axis]
        kept = folded = None
        if variance is not None:
            kept = torch.empty(3, channels, dtype=torch.float32, device=weight.device)
            folded = None if folding.live else torch.empty(channels, dtype=folding.dtype, device=weight.device)
        with torch.cuda.device_of(weight):
            _fold[(channels,)](
                weight, out, log2_scale, kept, folded, mean, variance, gamma, beta, bias, folding.eps,
                *_options(weight, log2_scale, folding),
            )  # fmt: skip
        ctx.save_for_backward(weight, log2_scale, kept)
        ctx.folding = folding
        ctx.set_materialize_grads(False)
        return out, folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, bias_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, log2_scale, kept = ctx.saved_tensors
        _, by_scale, _, _, by_gamma, by_beta, by_bias, _ = ctx.needs_input_grad
        channels = weight.shape[ctx.folding.axis]
        grad = torch.zeros_like(weight) if grad is None else laid_out_like(grad, weight)
        if bias_grad is None and kept is not None and not ctx.folding.live:
            bias_grad = torch.zeros(channels, dtype=torch.float32, device=weight.device)
        (bias_grad,) = without_gaps(bias_grad)
        dweight = torch.empty_like(weight)
        sums = torch.empty(4, channels, dtype=torch.float32, device=weight.device)
        with torch.cuda.device_of(weight):
            _fold_backward[(channels,)](
                grad, bias_grad, weight, dweight, sums, log2_scale, kept, *_options(weight, log2_scale, ctx.folding)
            )
        dscale = None if not by_scale else sums[0] if log2_scale.dim() else sums[0].sum()
        dgamma, dbeta, dbias = (
            sums[row] if wanted and bias_grad is not None else None
            for row, wanted in ((1, by_gamma), (2, by_beta), (3, by_bias))
        )
        return dweight, dscale, None, None, dgamma, dbeta, dbias, None


def _options(weight: Tensor, log2_scale: Tensor, folding: Folding) -> tuple[Any, ...]:
    """What both kernels take last."""
    channels = weight.shape[folding.axis]
    length = weight.numel() // channels
    stride = weight.stride(folding.axis)
    block = next((block for block in BLOCKS if block >= length), BLOCKS[-1])
    return (
        float(folding.qmin), float(folding.qmax), channels, length, stride,
        log2_scale.dim() > 0, folding.power_of_two, folding.live, block,
    )  # fmt: skip
