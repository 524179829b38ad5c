# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The weights of many layers in one launch each way: of a net, those of one layer after the other keep a GPU waiting.

Where each tensor lies is a table of addresses, which travels to the GPU before the launch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_qat.quantization.kernels.folding import FoldCall, Folding
from hf_qat.quantization.kernels.layout import in_memory_order, laid_out_like, without_gaps
from hf_qat.quantization.kernels.weight import fold_channel, fold_channel_backward
from hf_qat.quantization.transforms import once_differentiable


#: Values of a channel that a program works on together.
BLOCK = 256

#: Tensors of a `FoldCall`, and so gradients.
TENSORS = 7

#: Rows of the table: sizes of a layer, the first of its channels among those of all, and addresses.
CHANNELS, LENGTH, INNER, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
WEIGHT, OUT, SCALE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
MEAN, VARIANCE, GAMMA, BETA, BIAS = (
    tl.constexpr(7),
    tl.constexpr(8),
    tl.constexpr(9),
    tl.constexpr(10),
    tl.constexpr(11),
)
GRAD, BIAS_GRAD = tl.constexpr(7), tl.constexpr(8)  # in backward

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _size(table_at, field, layers, layer):
    return tl.load(table_at + field * layers + layer).to(tl.int32)


@triton.jit
def _address(table_at, field, layers, layer, TYPE: tl.constexpr):
    return tl.load(table_at + field * layers + layer).to(tl.pointer_type(TYPE))


@triton.jit
def _fold_together(
    table_at, layer_at, kept_at, bias_out_at, layers, rows, eps, qmin, qmax,
    TYPE: tl.constexpr, FOLDS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_BIAS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each channel of each layer."""
    row = tl.program_id(0)
    layer = tl.load(layer_at + row)
    mean_at, variance_at, gamma_at, beta_at, bias_at = None, None, None, None, None
    if FOLDS:
        mean_at = _address(table_at, MEAN, layers, layer, tl.float32)
        variance_at = _address(table_at, VARIANCE, layers, layer, tl.float32)
    if HAS_GAMMA:
        gamma_at = _address(table_at, GAMMA, layers, layer, tl.float32)
    if HAS_BETA:
        beta_at = _address(table_at, BETA, layers, layer, tl.float32)
    if HAS_BIAS:
        bias_at = _address(table_at, BIAS, layers, layer, tl.float32)
    fold_channel(
        _address(table_at, WEIGHT, layers, layer, tl.float32), _address(table_at, OUT, layers, layer, TYPE),
        _address(table_at, SCALE, layers, layer, tl.float32), kept_at, bias_out_at,
        mean_at, variance_at, gamma_at, beta_at, bias_at, eps, qmin, qmax,
        row - _size(table_at, FIRST, layers, layer), _size(table_at, CHANNELS, layers, layer),
        _size(table_at, LENGTH, layers, layer), _size(table_at, INNER, layers, layer), row, rows,
        PER_CHANNEL, POWER_OF_TWO, LIVE, BLOCK,
    )  # fmt: skip


@triton.jit
def _fold_together_backward(
    table_at, layer_at, kept_at, sums_at, layers, rows, qmin, qmax,
    TYPE: tl.constexpr, BY_BIAS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each channel of each layer."""
    row = tl.program_id(0)
    layer = tl.load(layer_at + row)
    bias_grad_at = None
    if BY_BIAS:
        bias_grad_at = _address(table_at, BIAS_GRAD, layers, layer, TYPE)
    fold_channel_backward(
        _address(table_at, GRAD, layers, layer, TYPE), bias_grad_at,
        _address(table_at, WEIGHT, layers, layer, tl.float32), _address(table_at, OUT, layers, layer, tl.float32),
        sums_at, _address(table_at, SCALE, layers, layer, tl.float32), kept_at, qmin, qmax,
        row - _size(table_at, FIRST, layers, layer), _size(table_at, CHANNELS, layers, layer),
        _size(table_at, LENGTH, layers, layer), _size(table_at, INNER, layers, layer), row, rows,
        PER_CHANNEL, POWER_OF_TWO, LIVE, BLOCK,
    )  # fmt: skip


def fused_fold_together(calls: Sequence[FoldCall]) -> list[tuple[Tensor, Tensor | None]]:
    """`fused_fold` of each of `calls`, which are of one `kind`."""
    axes = tuple(call.folding.axis for call in calls)
    tensors = [tensor for call in calls for tensor in (call.weight, call.log2_scale, *(call.norm or (None,) * 5))]
    outputs: tuple[Tensor, ...] = _FoldTogether.apply(calls[0].folding, axes, *tensors)
    biases = outputs[len(calls) :] or (None,) * len(calls)
    return list(zip(outputs[: len(calls)], biases, strict=True))


class _FoldTogether(torch.autograd.Function):
    """Saves the weights and three numbers for each channel."""

    @staticmethod
    def forward(ctx: Any, folding: Folding, axes: tuple[int, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights: Any = tensors[::TENSORS]
        groups: list[Any] = [without_gaps(*tensors[i::TENSORS]) for i in range(1, TENSORS)]
        scales, means, _, gammas, betas, biases = groups
        ordered, alike = zip(*(in_memory_order(weight) for weight in weights), strict=True)
        outs = [a if a.dtype == folding.dtype else torch.empty_like(a, dtype=folding.dtype) for a in alike]
        sizes, rows = _sizes(ordered, axes)
        device, kept, bias_out = ordered[0].device, None, None
        if means[0] is not None:
            kept = torch.empty(3, rows, dtype=torch.float32, device=device)
            bias_out = None if folding.live else torch.empty(rows, dtype=folding.dtype, device=device)
        table = _table([*sizes, *map(_addresses, (ordered, outs, *groups))], device)
        present = [group[0] is not None for group in (means, gammas, betas, biases)]
        with torch.cuda.device_of(table):
            _fold_together[(rows,)](
                table, _layers_of(tuple(sizes[0]), device), kept, bias_out, len(axes), rows, folding.eps,
                float(folding.qmin), float(folding.qmax), TYPES[folding.dtype], *present, *_flags(scales, folding),
            )  # fmt: skip
        ctx.save_for_backward(kept, *ordered, *scales)
        ctx.folding, ctx.sizes, ctx.rows = folding, sizes, rows
        ctx.set_materialize_grads(False)
        return (*outs, *(() if bias_out is None else bias_out.split(sizes[0])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, *saved = ctx.saved_tensors
        count, folding, sizes, rows = len(saved) // 2, ctx.folding, ctx.sizes, ctx.rows
        weights, scales = saved[:count], saved[count:]
        device, has_bias = weights[0].device, len(grads) > count
        incoming = [_of_weight(grads[i], weight, folding) for i, weight in enumerate(weights)]
        of_biases: list[Any] = [None] * count
        if has_bias:
            of_biases = [_of_bias(grads[count + i], size, folding, device) for i, size in enumerate(sizes[0])]
        dweights = [torch.empty_like(weight) for weight in weights]
        sums = torch.empty(4, rows, dtype=torch.float32, device=device)
        addresses = map(_addresses, (weights, dweights, scales, incoming, of_biases))
        table = _table([*sizes, *addresses], device)
        with torch.cuda.device_of(table):
            _fold_together_backward[(rows,)](
                table, _layers_of(tuple(sizes[0]), device), kept, sums, count, rows,
                float(folding.qmin), float(folding.qmax), TYPES[folding.dtype], has_bias, *_flags(scales, folding),
            )  # fmt: skip
        by_scale, by_gamma, by_beta, by_bias = (row.split(sizes[0]) for row in sums)
        if not scales[0].dim():
            by_scale = tuple(channels.sum() for channels in by_scale)
        none = (None,) * count
        of_norm = (by_gamma, by_beta, by_bias) if has_bias else (none, none, none)
        found = [g for layer in zip(dweights, by_scale, none, none, *of_norm, strict=True) for g in layer]
        wanted = ctx.needs_input_grad[2:]
        return None, None, *(grad if needed else None for grad, needed in zip(found, wanted, strict=True))


def _sizes(weights: Sequence[Tensor], axes: Sequence[int]) -> tuple[list[list[int]], int]:
    """The rows of the table that hold sizes, and the number of channels of all."""
    channels = [weight.shape[axis] for weight, axis in zip(weights, axes, strict=True)]
    lengths = [weight.numel() // c for weight, c in zip(weights, channels, strict=True)]
    inner = [weight.stride(axis) for weight, axis in zip(weights, axes, strict=True)]
    firsts, rows = [], 0
    for count in channels:
        firsts.append(rows)
        rows += count
    return [channels, lengths, inner, firsts], rows


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    """(fields, layers) int64."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _layers_of(channels: tuple[int, ...], device: torch.device) -> Tensor:
    """Of each channel, which layer it is of; int32."""
    layers = torch.arange(len(channels), dtype=torch.int32)
    return layers.repeat_interleave(torch.tensor(channels, dtype=torch.int64)).to(device)


def _flags(scales: Sequence[Tensor], folding: Folding) -> tuple[bool, bool, bool, int]:
    return scales[0].dim() > 0, folding.power_of_two, folding.live, BLOCK


def _of_weight(grad: Tensor | None, weight: Tensor, folding: Folding) -> Tensor:
    """Laid out like the weight; zeros where nothing depends on it."""
    if grad is None:
        return torch.zeros_like(weight, dtype=folding.dtype)
    return laid_out_like(grad, weight)


def _of_bias(grad: Tensor | None, size: int, folding: Folding, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=folding.dtype, device=device) if grad is None else grad.contiguous()
