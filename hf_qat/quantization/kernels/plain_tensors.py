"""Which tensors compiled code may take: Triton's kernels and Numba's loops read memory, past PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether the memory of `x` holds its numbers: not in a subclass, nor where their sign is still to be changed."""
    return type(x) in _PLAIN and not x.is_neg()


def is_watched() -> bool:
    """Whether somebody needs to see each operation: a tracer, a transform of `torch.func`, a dispatch mode."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
