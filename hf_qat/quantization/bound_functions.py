"""The functions that PyTorch binds to Python for operations of a graph.

An operation of `torch.ops` matches its arguments with a schema at every call, which makes the way to the same kernel
twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


aten = torch.ops.aten

#: The function has the operation's name.
_DEFAULTS = (
    "cat", "conv1d", "conv2d", "conv3d", "layer_norm", "matmul", "permute", "relu", "reshape", "unsqueeze",
)  # fmt: skip

#: Operation → the function that takes its arguments.
BOUND: dict[Any, Callable[..., Any]] = {
    **{getattr(aten, name).default: getattr(torch, name) for name in _DEFAULTS},
    **{getattr(aten, name).Tensor: getattr(torch, name) for name in ("add", "div", "mul", "sub")},
    **{getattr(aten, name).input: getattr(torch, name) for name in ("conv_transpose2d", "conv_transpose3d")},
    aten.contiguous.default: Tensor.contiguous,
    aten.expand.default: Tensor.expand,
    aten.flatten.using_ints: torch.flatten,
    aten.gelu.default: torch.nn.functional.gelu,
    aten.linear.default: torch.nn.functional.linear,
    aten.select.int: torch.select,
    aten.softmax.int: torch.softmax,
    aten.sym_size.int: Tensor.size,
    aten.to.dtype: Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.view.default: Tensor.view,
}
