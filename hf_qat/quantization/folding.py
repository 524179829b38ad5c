"""Fake quantization of a weight with one scale per channel, and with a batch norm folded in.

Folding: Krishnamoorthi 2018, §3.2.2. Learned scales: LSQ, Esser et al. 2020, eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import along, pass_between
from hf_qat.quantization.saved_codes import fits_byte, keep_codes, keeps_codes


#: Elements that a CPU works on together. More than a few megabytes of new memory come from the system, page by page,
#: and go back at once: that takes several times as long as the arithmetic.
BLOCK = 2**18


def fold_fake_quantize(
    weight: Tensor, multiplier: Tensor | None, step: Tensor, qmin: int, qmax: int, axis: int
) -> Tensor:
    """Fold a factor per channel into a weight and quantize it, in one expression.

    `clamp(round(weight * multiplier), qmin, qmax) * step`: with `multiplier = factor / scale` and `step = scale` this
    is the fake-quantized folded weight; with `step = scale / factor` it is that weight with the factor divided out
    again, for a convolution that a live batch norm follows. Without a multiplier the weight is divided by `step`.
    Gradients reach `weight` (straight through, inside the range), `multiplier` and `step`, so scale and factor get
    theirs by the chain rule.

    Args:
        weight: any shape, float32.
        multiplier, step: () or (C,), float32; C is the size of `weight` along `axis`.
    """
    out: Tensor = _FoldFakeQuantize.apply(weight, multiplier, step, qmin, qmax, axis)
    return out


class _FoldFakeQuantize(torch.autograd.Function):
    """Saves the weight, which is kept anyway, and the output (or its codes), as the convolution after it does."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, multiplier: Tensor | None, step: Tensor, qmin: int, qmax: int, axis: int
    ) -> Tensor:
        size = along(step, weight, axis)
        out = torch.div(weight, size) if multiplier is None else torch.mul(weight, along(multiplier, weight, axis))
        codes = None
        if torch.compiler.is_compiling():  # see `round_to_codes`
            out = out.round().clamp(qmin, qmax) * size
        else:
            out.round_().clamp_(qmin, qmax)
            codes = out.to(torch.int8) if keeps_codes() and fits_byte(qmin, qmax) else None
            out.mul_(size)
        if codes is not None:
            keep_codes(out, codes, 0, size)
        kept = out if codes is None else codes
        ctx.save_for_backward(weight, kept if step.requires_grad else None, multiplier, step)
        ctx.low, ctx.high, ctx.axis = float(qmin), float(qmax), axis
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, out, multiplier, step = ctx.saved_tensors
        by_multiplier = ctx.needs_input_grad[1]
        size = _of_channels(step, weight, ctx.axis)
        factor = None if multiplier is None else _of_channels(multiplier, weight, ctx.axis)
        if out is not None and out.dtype == torch.int8:
            out = out.float().mul_(size)
        gradients = _by_formula if torch.compiler.is_compiling() else _in_blocks
        bounds = ctx.low, ctx.high
        dweight, passed, rounded = gradients(weight, grad, out, factor, size, bounds, ctx.axis, by_multiplier)
        dmultiplier = passed * step if passed is not None else None
        dstep = rounded / step if rounded is not None else None
        return dweight, _shaped(dmultiplier, multiplier), _shaped(dstep, step), None, None, None


def _by_formula(
    weight: Tensor,
    grad: Tensor,
    out: Tensor | None,
    factor: Tensor | None,
    size: Tensor,
    bounds: tuple[float, float],
    axis: int,
    by_multiplier: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `_in_blocks` computes, as one expression for a compiler to fuse."""
    y = weight / size if factor is None else weight * factor
    inside = (y > bounds[0]) & (y < bounds[1])
    passed = torch.where(inside, grad, 0.0)
    rounded = None
    if out is not None:
        change = out - torch.where(inside, weight, 0.0) if factor is None else out
        rounded = _sum_to(grad * change, axis)
    dweight = passed if factor is None else passed * (factor * size)
    return dweight, _sum_to(passed * weight, axis) if by_multiplier else None, rounded


def _in_blocks(
    weight: Tensor,
    grad: Tensor,
    out: Tensor | None,
    factor: Tensor | None,
    size: Tensor,
    bounds: tuple[float, float],
    axis: int,
    by_multiplier: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of the weight, and sums per channel for the multiplier and, where there is an `out`, for the step."""
    blocks = _blocks(weight, axis)
    if len(blocks) == 1:
        return _in_one_block(weight, grad, out, factor, size, bounds, axis, by_multiplier)
    dweight, products = torch.empty_like(weight), None
    passed, rounded = [], []
    for rows in blocks:
        w, dy = weight[rows], dweight[rows]
        products = torch.empty_like(dy) if products is None else products[: len(dy)]
        per_channel = None if factor is None else factor[rows], size[rows]
        part = None if out is None else out[rows]
        _, p, r = _in_one_block(w, grad[rows], part, *per_channel, bounds, axis, by_multiplier, (dy, products))
        passed.append(p)
        rounded.append(r)
    return dweight, _joined(passed), _joined(rounded)


def _joined(sums: list[Tensor | None]) -> Tensor | None:
    found = [part for part in sums if part is not None]
    return torch.cat(found) if found else None


def _in_one_block(
    weight: Tensor,
    grad: Tensor,
    out: Tensor | None,
    factor: Tensor | None,
    size: Tensor,
    bounds: tuple[float, float],
    axis: int,
    by_multiplier: bool,
    memory: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same of some of the channels; the gradient and intermediate products are written into `memory`, if given."""
    low, high = bounds
    dy, products = memory
    passed = rounded = None
    if factor is None:
        dy = torch.div(weight, size, out=dy)
        if out is not None:  # one sum of what rounding does: the difference of two sums would cancel
            products = dy.clone() if products is None else products.copy_(dy)
            pass_between(weight, products, low, high)
            rounded = _sum_to(torch.sub(out, products, out=products).mul_(grad), axis)
        return pass_between(grad, dy, low, high), None, rounded
    dy = pass_between(grad, torch.mul(weight, factor, out=dy), low, high)
    if by_multiplier:
        products = torch.mul(dy, weight, out=products)
        passed = _sum_to(products, axis)
    if out is not None:
        rounded = _sum_to(torch.mul(grad, out, out=products), axis)
    return dy.mul_(factor * size), passed, rounded


def _of_channels(parameter: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One value for each channel, () or (C,), to broadcast with the weight along all other axes."""
    return along(parameter if parameter.dim() else parameter.expand(weight.shape[axis]), weight, axis)


def _shaped(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """One gradient per channel, or their sum for a parameter that all channels share."""
    shared = parameter is not None and parameter.dim() == 0
    return gradient.sum() if gradient is not None and shared else gradient


def _sum_to(x: Tensor, axis: int) -> Tensor:
    """Sum over all axes but one."""
    others = [d for d in range(x.dim()) if d != axis]
    return x.sum(others) if others else x.clone()


def _blocks(weight: Tensor, axis: int) -> list[slice]:
    """Parts of a weight along its first axis; one part on a GPU, and where the channels are another axis."""
    count = weight.shape[0]
    together = axis == 0 and weight.device.type == "cpu"
    rows = max(1, BLOCK * count // weight.numel()) if together else count
    return [slice(start, start + rows) for start in range(0, count, rows)]
