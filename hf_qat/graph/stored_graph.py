"""An fx graph as plain data, for pickles: PyTorch's own nodes hold fake tensors and modes, which cannot be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.fx.node import map_aggregate

from hf_qat.graph.nodes import MODULE_PATH


#: Stands for a size that depends on values.
UNKNOWN_SIZE = 2


@dataclass(frozen=True)
class Reference:
    """Stands for the node at `position` among the arguments of another."""

    position: int


@dataclass(frozen=True)
class StoredNode:
    """A node whose arguments refer to others by position.

    Attributes:
        op, target, args, kwargs: as `fx.Node` has them.
        module_path: `node.meta[MODULE_PATH]`, if it is there.
        value: shape and dtype of the tensor that it stands for; `None` where it is none.
    """

    op: str
    target: Any
    args: Any
    kwargs: Any
    module_path: str | None
    value: tuple[tuple[int, ...], torch.dtype] | None


def store_graph(graph: fx.Graph) -> list[StoredNode]:
    """The nodes of a graph, in order."""
    positions: dict[Any, Any] = {node: Reference(k) for k, node in enumerate(graph.nodes)}
    return [
        StoredNode(
            node.op,
            node.target,
            fx.map_arg(node.args, positions.__getitem__),
            fx.map_arg(node.kwargs, positions.__getitem__),
            node.meta.get(MODULE_PATH),
            _described(node.meta.get("val")),
        )
        for node in graph.nodes
    ]


def restore_graph(stored: list[StoredNode]) -> fx.Graph:
    """The graph of `store_graph`; its values are tensors on the meta device, of one size in a free axis."""
    graph, nodes = fx.Graph(), []
    for node in stored:
        args, kwargs = (
            map_aggregate(values, lambda x: nodes[x.position] if isinstance(x, Reference) else x)
            for values in (node.args, node.kwargs)
        )
        made = graph.create_node(node.op, node.target, args, kwargs)
        if node.module_path is not None:
            made.meta[MODULE_PATH] = node.module_path
        if node.value is not None:
            shape, dtype = node.value
            made.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        nodes.append(made)
    return graph


def _described(value: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    return (tuple(map(_size, value.shape)), value.dtype) if isinstance(value, Tensor) else None


def _size(n: int | torch.SymInt) -> int:
    """A free size becomes that of the examples; one that depends on values (a number of key points) has none there."""
    return UNKNOWN_SIZE if has_free_unbacked_symbols(n) else int(n)
