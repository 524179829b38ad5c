"""The reductions by which observers agree over the ranks of `torch.distributed`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_active() -> bool:
    """Whether there is a process group with anyone else in it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def synchronized_range(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Least minimum and greatest maximum of all ranks, element by element; what was passed, without a process group.

    Collective and exact. One message: a least value is the negative of the greatest of the negatives.

    Args:
        minimum, maximum: same shape, type and device.
    """
    if not is_active():
        return minimum, maximum
    both = torch.stack([-minimum, maximum])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return -both[0], both[1]


def range_over_ranks(minima: list[float], maxima: list[float]) -> tuple[list[float], list[float]]:
    """`synchronized_range` of float32 values kept as numbers; all ranks pass equally many, at least one."""
    bounds = (torch.tensor(values, dtype=torch.float32, device=_device()) for values in (minima, maxima))
    low, high = synchronized_range(*bounds)
    return low.tolist(), high.tolist()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of the tensors of all ranks; what was passed, without a process group."""
    if not is_active():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, dist.ReduceOp.SUM)
    return total / dist.get_world_size()


def max_over_ranks(number: int) -> int:
    """Greatest of the numbers of all ranks."""
    tensor = torch.tensor(number, dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def min_over_ranks(number: int) -> int:
    """Least of the numbers of all ranks; what was passed, without a process group."""
    return -max_over_ranks(-number) if is_active() else number


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Sum over all ranks of an int64 tensor on the CPU, as a new tensor there."""
    total = counts.to(_device(), copy=True)
    dist.all_reduce(total, dist.ReduceOp.SUM)
    return total.cpu()


def _device() -> torch.device:
    """Where the tensors of a message must live: NCCL sends from the GPU only."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
