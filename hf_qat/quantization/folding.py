"""Fake quantization of a weight with one scale per channel, and with a batch norm folded in.

Folding: Krishnamoorthi 2018, §3.2.2. Learned scales: LSQ, Esser et al. 2020, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_qat.quantization.fake_quantize import along, pass_between
from hf_qat.quantization.saved_codes import fits_byte, keep_codes, keeps_codes
from hf_qat.quantization.transforms import once_differentiable, refuse_transforms


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
    refuse_transforms()
    out: Tensor = _FoldFakeQuantize.apply(weight, multiplier, step, qmin, qmax, axis)
    return out


class _FoldFakeQuantize(torch.autograd.Function):
    """Saves the weight, which is kept anyway, and the output (or its codes), as the convolution after it does."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, multiplier: Tensor | None, step: Tensor, qmin: int, qmax: int, axis: int
    ) -> Tensor:
        out, kept = rounded_weight(weight, multiplier, step, qmin, qmax, axis)
        ctx.save_for_backward(weight, kept if step.requires_grad else None, multiplier, step)
        ctx.low, ctx.high, ctx.axis = float(qmin), float(qmax), axis
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, multiplier, step = ctx.saved_tensors
        saved = saved_weight(weight, kept, multiplier, step, ctx.low, ctx.high, ctx.axis)
        dweight, passed, rounded = weight_gradients(grad, saved, ctx.needs_input_grad[1])
        dmultiplier = passed * step if passed is not None else None
        dstep = rounded / step if rounded is not None else None
        return dweight, summed_for(multiplier, dmultiplier), summed_for(step, dstep), None, None, None


def rounded_weight(
    weight: Tensor, multiplier: Tensor | None, step: Tensor, qmin: int, qmax: int, axis: int
) -> tuple[Tensor, Tensor]:
    """The value of `fold_fake_quantize`, and what to keep of it for backward: itself, or its codes in int8."""
    size = along(step, weight, axis)
    out = torch.div(weight, size) if multiplier is None else torch.mul(weight, along(multiplier, weight, axis))
    if torch.compiler.is_compiling():  # see `round_to_codes`
        out = out.round().clamp(qmin, qmax) * size
        return out, out
    out.round_().clamp_(qmin, qmax)
    codes = out.to(torch.int8) if keeps_codes() and fits_byte(qmin, qmax) else None
    out.mul_(size)
    if codes is None:
        return out, out
    keep_codes(out, codes, 0, size)
    return out, codes


class SavedWeight(NamedTuple):
    """What the gradients of a rounded weight are computed from; parameters per channel broadcast with the weight.

    Attributes:
        weight: before it was rounded.
        out: what came out; `None` where the step gets no gradient.
        factor: what the weight was multiplied by; `None` if it was divided by `size`.
        size: the step.
        low, high: lowest and highest code.
        axis: of the channels.
    """

    weight: Tensor
    out: Tensor | None
    factor: Tensor | None
    size: Tensor
    low: float
    high: float
    axis: int

    def split(self, rows: int) -> list[SavedWeight]:
        """So many channels at a time; they run along the first axis."""
        weights, sizes = self.weight.split(rows), self.size.split(rows)
        outs, factors = (_split(x, rows, len(weights)) for x in (self.out, self.factor))
        return [
            self._replace(weight=weight, out=out, factor=factor, size=size)
            for weight, out, factor, size in zip(weights, outs, factors, sizes, strict=True)
        ]


def _split(x: Tensor | None, rows: int, parts: int) -> Sequence[Tensor | None]:
    return [None] * parts if x is None else x.split(rows)


def saved_weight(
    weight: Tensor, kept: Tensor | None, multiplier: Tensor | None, step: Tensor, low: float, high: float, axis: int
) -> SavedWeight:
    """What `rounded_weight` kept, for `weight_gradients`."""
    size = _of_channels(step, weight, axis)
    factor = None if multiplier is None else _of_channels(multiplier, weight, axis)
    out = kept.float().mul_(size) if kept is not None and kept.dtype == torch.int8 else kept
    return SavedWeight(weight, out, factor, size, low, high, axis)


#: Gradient of the weight, and sums per channel: of passing gradients times the weight, and of what rounding does.
Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def weight_gradients(grad: Tensor, saved: SavedWeight, by_factor: bool) -> Gradients:
    """The gradients of a rounded weight.

    Args:
        grad: that of `saved.out`.
        saved: the rest.
        by_factor: the first sum is wanted; the second is where there is a `saved.out`.
    """
    if torch.compiler.is_compiling():
        return _by_formula(grad, saved, by_factor)
    rows = _rows_together(saved.weight, saved.axis)
    if rows >= len(saved.weight):
        return _in_one_block(grad, saved, by_factor, (None, None))
    dweight = torch.empty_like(saved.weight)
    products = torch.empty_like(dweight[:rows])
    passed, rounded = [], []
    for g, dy, part in zip(grad.split(rows), dweight.split(rows), saved.split(rows), strict=True):
        _, p, r = _in_one_block(g, part, by_factor, (dy, products[: len(dy)]))
        passed.append(p)
        rounded.append(r)
    return dweight, _joined(passed), _joined(rounded)


def _by_formula(grad: Tensor, saved: SavedWeight, by_factor: bool) -> Gradients:
    """As one expression for a compiler to fuse."""
    weight, out, factor, size, low, high, axis = saved
    y = weight / size if factor is None else weight * factor
    inside = (y > low) & (y < high)
    passed = torch.where(inside, grad, 0.0)
    rounded = None
    if out is not None:
        change = out - torch.where(inside, weight, 0.0) if factor is None else out
        rounded = _sum_to(grad * change, axis)
    dweight = passed if factor is None else passed * (factor * size)
    return dweight, _sum_to(passed * weight, axis) if by_factor else None, rounded


def _joined(sums: list[Tensor | None]) -> Tensor | None:
    found = [part for part in sums if part is not None]
    return torch.cat(found) if found else None


def _in_one_block(
    grad: Tensor, saved: SavedWeight, by_factor: bool, memory: tuple[Tensor | None, Tensor | None]
) -> Gradients:
    """The gradient and intermediate products are written into `memory`, if given."""
    weight, out, factor, size, low, high, axis = saved
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
    if by_factor:
        products = torch.mul(dy, weight, out=products)
        passed = _sum_to(products, axis)
    if out is not None:
        rounded = _sum_to(torch.mul(grad, out, out=products), axis)
    return dy.mul_(factor * size), passed, rounded


def _of_channels(parameter: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One value for each channel, () or (C,), to broadcast with the weight along all other axes."""
    return along(parameter if parameter.dim() else parameter.expand(weight.shape[axis]), weight, axis)


def summed_for(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """One gradient per channel, or their sum for a parameter that all channels share."""
    shared = parameter is not None and parameter.dim() == 0
    return gradient.sum() if gradient is not None and shared else gradient


def _sum_to(x: Tensor, axis: int) -> Tensor:
    """Sum over all axes but one."""
    others = [d for d in range(x.dim()) if d != axis]
    return x.sum(others) if others else x.clone()


def _rows_together(weight: Tensor, axis: int) -> int:
    """How many slices of a weight along its first axis to work on at a time; all on a GPU, and across channels."""
    count = weight.shape[0]
    together = axis == 0 and weight.device.type == "cpu"
    return max(1, BLOCK * count // weight.numel()) if together else count
