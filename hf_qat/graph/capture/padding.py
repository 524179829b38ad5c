"""Let convolutions pad for themselves: a pad of zeros in front of one becomes its `padding`, and a copy is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)

#: Arguments of a convolution: input and weight (always given), bias, stride, padding.
DEFAULTS: tuple[Any, ...] = (None, None, None, [1], [0])


def merge_padding(graph: fx.Graph) -> None:
    """Merge symmetric zero padding into the convolutions after it, in place; dead code is left."""
    for node in graph.nodes:
        if node.target in CONVOLUTIONS and isinstance(node.args[0], fx.Node):
            _merge(node.args[0], node)


def _merge(pad: fx.Node, convolution: fx.Node) -> None:
    dims = convolution.meta["val"].dim() - 2
    added = _zeros_added(pad, dims)
    if added is None or convolution.kwargs:
        return
    arguments: list[Any] = [*convolution.args, *DEFAULTS[len(convolution.args) :]]
    _, weight, bias, stride, padding, *rest = arguments
    total = [have + more for have, more in zip(_each(padding, dims), added, strict=True)]
    convolution.args = (pad.args[0], weight, bias, stride, total, *rest)


def _zeros_added(pad: fx.Node, dims: int) -> list[int] | None:
    """Zeros on either side of each of the last `dims` axes; `None` for any other padding and any other operation."""
    if pad.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    amounts: Any = pad.args[1]
    numbers = len(amounts) <= 2 * dims and all(isinstance(n, int) and n >= 0 for n in amounts)
    mode, value = _filling(pad)
    if not numbers or amounts[::2] != amounts[1::2] or mode != "constant" or value not in (None, 0):
        return None
    # The list starts with the last axis.
    return [0] * (dims - len(amounts) // 2) + list(amounts[::2])[::-1]


def _filling(pad: fx.Node) -> tuple[Any, Any]:
    """Mode and value."""
    rest = pad.args[2:]
    if pad.target is aten.constant_pad_nd.default:
        return "constant", rest[0] if rest else 0
    mode = rest[0] if rest else pad.kwargs.get("mode", "constant")
    return mode, rest[1] if len(rest) > 1 else pad.kwargs.get("value")


def _each(padding: Any, dims: int) -> list[int]:
    """One number per axis; one alone stands for all."""
    return list(padding) * dims if len(padding) == 1 else list(padding)
