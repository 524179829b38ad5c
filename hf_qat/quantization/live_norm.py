"""A batch norm by the statistics of its batch: what the operation of a layer ends in while batch norm is live.

The module's own forward is not called: it may do more than normalise (timm's `BatchNormAct2d` activates, too), and
that stands in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.quantization.synchronized_norm import SynchronizedBatchNorm


def normalise_live(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise by batch statistics, and let the running ones follow, as `nn.BatchNorm2d` in training (Ioffe 2015).

    Args:
        norm: a batch norm with running statistics.
        x: (N, C, …).

    Returns:
        The shape and dtype of `x`.
    """
    bn: Any = norm
    # Not the module's own forward, which may be that of a layer, and come back here.
    if isinstance(norm, SynchronizedBatchNorm):
        return SynchronizedBatchNorm.forward(norm, x)
    if isinstance(norm, nn.SyncBatchNorm):
        return nn.SyncBatchNorm.forward(norm, x)
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches
            momentum = 1.0 / float(bn.num_batches_tracked)
    statistics = bn.running_mean, bn.running_var
    return nn.functional.batch_norm(x, *statistics, bn.weight, bn.bias, True, momentum or 0.0, bn.eps)


def is_live(norm: nn.Module | None) -> bool:
    """Whether the mode of a batch norm wants batch statistics; one that is frozen for good never does."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training
