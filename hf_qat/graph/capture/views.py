"""Writes through a view (`x[..., :2] += y`) without writing: the part is computed, and the whole put together anew.

A quantizer saves tensors for its backward pass, and its result must not change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hf_qat.graph.nodes import emitter, functional_twin, is_view, writes_first_argument


aten = torch.ops.aten

#: The end that the exporter writes for a slice without one.
OPEN_END = 2**63 - 1


def replace_writes(graph: fx.Graph) -> None:
    """Rewrite each in-place operation on a slice or a selection of a tensor, in place; others stay what they are.

    Args:
        graph: of flat tensors.
    """
    for node in list(graph.nodes):
        twin = functional_twin(node.target) if writes_first_argument(node) else None
        chain = _chain(node.args[0]) if twin is not None else None
        if twin is None or not chain or _has_other_views(chain, node):
            continue
        emit = emitter(node)
        source = node.args[1] if node.target is aten.copy_.default else None
        part = emit(twin, *node.args, **node.kwargs) if source is None else _like(emit, node.args[0], source)
        _replace_later(node.args[0], node, part)
        node.replace_all_uses_with(part)
        for view in chain:
            whole = _put_back(emit, view, part)
            _replace_later(_holder(view), node, whole, keep={whole})
            part = whole
        graph.erase_node(node)


def _chain(view: Any) -> list[fx.Node]:
    """From the view that is written to back to the tensor that holds the memory; empty if one step is unknown."""
    chain: list[fx.Node] = []
    while isinstance(view, fx.Node) and view.target in (aten.slice.Tensor, aten.select.int):
        step = view.args[4] if len(view.args) > 4 else 1
        size = _holder(view).meta["val"].shape[_dim(view)]
        if step != 1 or not (isinstance(size, int) or _is_whole(view)):
            return []
        chain.append(view)
        view = view.args[0]
    return chain


def _has_other_views(chain: list[fx.Node], write: fx.Node) -> bool:
    """Whether another view of the same memory, made before the write, is read after it."""
    order = {node: position for position, node in enumerate(write.graph.nodes)}
    for holder in map(_holder, chain):
        for user in holder.users:
            before = order[user] < order[write] and user not in chain and is_view(user)
            if before and any(order[later] > order[write] for later in user.users):
                return True
    return False


def _replace_later(old: Any, write: fx.Node, new: fx.Node, keep: Any = frozenset()) -> None:
    """Let what reads `old` after the write read `new`."""
    order = {node: position for position, node in enumerate(write.graph.nodes)}
    for user in list(old.users):
        if order[user] > order[write] and user not in keep:
            user.replace_input_with(old, new)


def _put_back(emit: Callable[..., fx.Node], view: fx.Node, part: fx.Node) -> fx.Node:
    """What `view.args[0]` holds after `part` was written to `view`: a concatenation along the sliced axis."""
    if _is_whole(view):
        return part
    whole, dim = _holder(view), _dim(view)
    size = whole.meta["val"].shape[dim]
    if view.target is aten.select.int:
        start = _bound(view, 2) % size
        end, part = start + 1, emit(aten.unsqueeze.default, part, dim)
    else:
        start, end = _bounds(view, size)
    return replaced_part(emit, whole, part, dim, (start, end))


def replaced_part(
    emit: Callable[..., fx.Node], whole: fx.Node, part: fx.Node, dim: int, bounds: tuple[int, int]
) -> fx.Node:
    """`whole` with `part` from and to `bounds` of an axis: a concatenation, or the part alone if it is all of it."""
    start, end = bounds
    pieces = [emit(aten.slice.Tensor, whole, dim, 0, start)] if start > 0 else []
    pieces += [part]
    pieces += [emit(aten.slice.Tensor, whole, dim, end, OPEN_END)] if end < whole.meta["val"].shape[dim] else []
    return part if len(pieces) == 1 else emit(aten.cat.default, pieces, dim)


def _holder(view: fx.Node) -> fx.Node:
    """What a view is a part of."""
    holder = view.args[0]
    assert isinstance(holder, fx.Node)
    return holder


def _bound(view: fx.Node, position: int) -> Any:
    return view.args[position] if len(view.args) > position else None


def _is_whole(view: fx.Node) -> bool:
    """Whether a slice leaves nothing out: `x[:]`, of an axis of any size."""
    start, end = _bound(view, 2), _bound(view, 3)
    return view.target is aten.slice.Tensor and start in (None, 0) and end in (None, OPEN_END)


def _bounds(view: fx.Node, size: int) -> tuple[int, int]:
    return slice(_bound(view, 2), _bound(view, 3)).indices(size)[:2]


def _dim(view: fx.Node) -> int:
    rank = _holder(view).meta["val"].dim()
    dim = (_bound(view, 1) or 0) % rank
    assert isinstance(dim, int)
    return dim


def _like(emit: Callable[..., fx.Node], view: Any, source: Any) -> fx.Node:
    """The source of a copy, in the shape of what it is copied to."""
    if isinstance(source, fx.Node) and source.meta["val"].shape == view.meta["val"].shape:
        return source
    return emit(aten.expand_as.default, source, view)
