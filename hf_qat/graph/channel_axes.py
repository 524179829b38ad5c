"""Along which axis of a value channels run, as operations hand a positive factor per channel on, or do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from hf_qat.graph.rules import Kind, overloads, rule_of


aten = torch.ops.aten


@dataclass(frozen=True)
class Channels:
    """The channels of a value.

    Attributes:
        count: how many there are.
        axis: that they run along, counted from the end: -1 is the last.
        rank: how many axes the value has; `None` where that is not known.
    """

    count: int
    axis: int
    rank: int | None = None

    def from_end(self, dim: int) -> int | None:
        """The axis that an operation calls `dim`; `None` where it counts from the first, and nobody knows how many."""
        return dim if dim < 0 else None if self.rank is None else dim - self.rank

    def is_clear_of(self, dims: Sequence[int]) -> bool:
        """Whether an operation along `dims` surely leaves the channels where they are."""
        found = [self.from_end(dim) for dim in dims]
        return None not in found and self.axis not in found


def channels_after(node: fx.Node, read: Sequence[Channels | None]) -> Channels | None:
    """The channels of what an operation makes, where `f(s * x) = s * f(x)` for `s > 0` per channel; `None`, where not.

    Args:
        node: a call of a function.
        read: the channels of all nodes that it reads.
    """
    known = [channels for channels in read if channels is not None]
    if node.op != "call_function" or not known or len(known) < len(read):
        return None
    if node.target is aten.add.Tensor and len(known) == 2:  # one term alone: the other is a number
        same = {(channels.count, channels.axis) for channels in known}
        return replace(known[0], rank=None) if len(same) == 1 else None
    move = _MOVES.get(node.target)
    return None if move is None or len(known) > 1 else move(node, known[0])


def _stay(node: fx.Node, channels: Channels) -> Channels:
    return channels


def _spatial(node: fx.Node, channels: Channels, dims: int) -> Channels | None:
    """Pooling and resizing of the last `dims` axes, each channel by itself."""
    return channels if channels.axis < -dims else None


def _pad(node: fx.Node, channels: Channels) -> Channels | None:
    """Other constants than 0 would have to be scaled, too."""
    amounts: Any = node.args[1]
    around = list(amounts)[2 * (-channels.axis - 1) :][:2]
    return channels if rule_of(node).kind is Kind.PASS and not any(around) else None


def _permute(node: fx.Node, channels: Channels) -> Channels | None:
    dims: Any = node.args[1]
    rank = len(dims)
    positions = [dim % rank for dim in dims]
    return Channels(channels.count, positions.index(rank + channels.axis) - rank, rank)


def _transpose(node: fx.Node, channels: Channels) -> Channels | None:
    one, other = (channels.from_end(dim) for dim in node.args[1:3])  # type: ignore[arg-type]
    if one is None or other is None:
        return None
    return replace(channels, axis={one: other, other: one}.get(channels.axis, channels.axis))


def _reshape(node: fx.Node, channels: Channels) -> Channels | None:
    """Rows of so many channels stay rows."""
    sizes: Any = node.args[1]
    rows = channels.axis == -1 and sizes[-1] == channels.count
    return Channels(channels.count, -1, len(sizes)) if rows else None


def _roll(node: fx.Node, channels: Channels) -> Channels | None:
    dims: Any = node.args[2] if len(node.args) > 2 else ()
    return channels if dims and channels.is_clear_of(dims) else None


def _slice(node: fx.Node, channels: Channels) -> Channels | None:
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    return channels if channels.is_clear_of([dim]) else None


def _rows(move: Callable[[fx.Node, Channels], Channels | None], *packets: Any) -> dict[Any, Any]:
    return dict.fromkeys(overloads(*packets), move)


_MOVES: dict[Any, Callable[[fx.Node, Channels], Channels | None]] = {
    **_rows(_stay, aten.relu, aten.leaky_relu, aten.dropout, aten.contiguous, aten.clone, aten.detach, aten.alias),
    **_rows(partial(_spatial, dims=1), aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d),
    **_rows(partial(_spatial, dims=2), aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d),
    **_rows(partial(_spatial, dims=3), aten.max_pool3d, aten.avg_pool3d, aten.adaptive_avg_pool3d),
    **_rows(partial(_spatial, dims=1), aten.upsample_linear1d),
    **_rows(partial(_spatial, dims=2), aten.adaptive_max_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d),
    **_rows(_pad, aten.pad, aten.constant_pad_nd),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.roll.default: _roll,
    aten.slice.Tensor: _slice,
}
