"""Batch norm whose batch is that of all processes (Peng et al. 2018, §3.2: cross-GPU batch normalization).

`torch.nn.SyncBatchNorm` runs on GPUs only. This one runs wherever `torch.distributed` does, folded or not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_qat.quantization.class_swap import swap_class
from hf_qat.quantization.collectives import is_active
from hf_qat.quantization.ddp_calls import refuse_join


class SynchronizedBatchNorm(nn.Module):
    """Mixed into the class of a batch norm by `synchronize_batch_norms`; one process alone computes as before."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → the same shape, normalised by the statistics of all N of all processes; these may differ."""
        frozen = not self.training or getattr(self, "batch_norm_frozen", False)
        if frozen or not is_active():
            out: Tensor = super().forward(x)
            return out
        bn: Any = self
        out, mean, variance = _normalised(x, bn.weight, bn.bias, bn.eps)
        _remember(bn, mean, variance)
        return out


def synchronized_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """`torch.batch_norm` by the statistics of all processes, where it is by those of the batch."""
    if not training or not is_active():
        statistics = running_mean, running_var
        return torch.batch_norm(x, weight, bias, *statistics, training, momentum, eps, cudnn_enabled)
    out, mean, variance = _normalised(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance, momentum)
    return out


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The (N, C, …) of a process, normalised, and mean and unbiased variance, (C,), of all N of all processes."""
    refuse_join()
    axes = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    values = x.float()
    sums = torch.cat([values.sum(axes), values.new_tensor([values.numel() / values.shape[1]])])
    sums = _SumOfRanks.apply(sums)
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centred = values - mean.view(shape)
    # Not from a sum of squares: their difference from the squared mean would lose digits.
    variance = _SumOfRanks.apply(centred.square().sum(axes)) / count
    factor = torch.rsqrt(variance + eps)
    factor = factor if weight is None else factor * weight
    normalised = centred * factor.view(shape)
    result: Tensor = normalised if bias is None else normalised + bias.view(shape)
    return result.to(x.dtype), mean.detach(), variance.detach() * (count / (count - 1))


class _SumOfRanks(torch.autograd.Function):
    """Every process adds to the sum that all have, so the gradient of what it added is the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


@torch.no_grad()
def _remember(bn: Any, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics, as `nn.BatchNorm2d` does; no momentum means the average of all that are counted."""
    if bn.running_mean is None or not bn.track_running_stats:
        return
    momentum = bn.momentum or 0.0
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1 / float(bn.num_batches_tracked) if bn.momentum is None else momentum
    bn.running_mean.lerp_(mean, momentum)
    bn.running_var.lerp_(variance, momentum)


def synchronize_batch_norms(model: nn.Module) -> None:
    """Make all batch norms of `model` use the statistics of all processes, in place; a `nn.SyncBatchNorm` does."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if not isinstance(module, (nn.SyncBatchNorm, SynchronizedBatchNorm)):
                swap_class(module, SynchronizedBatchNorm)
