"""How a tensor's memory is handed to a kernel: in the order in which it lies there, whatever its strides."""

from __future__ import annotations

from typing import Any

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


def without_gaps(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Parameters and statistics, (C,) each, as a kernel reads them; copied only if their values lie apart."""
    return tuple(None if x is None else x.contiguous() for x in tensors)
