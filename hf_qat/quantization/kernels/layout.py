"""How a tensor's memory is handed to a kernel: in the order in which it lies there, whatever its strides."""

from __future__ import annotations

import torch
from torch import Tensor


def in_memory_order(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` without gaps, copied only if it has any, and a new tensor laid out like it."""
    out = torch.empty_like(x)
    if out.stride() != x.stride():
        x, out = out.copy_(x), torch.empty_like(out)
    return x, out


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """`x` with the strides of `other`, copied only if it has different ones."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)
