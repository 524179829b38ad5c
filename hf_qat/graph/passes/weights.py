"""Which values of a graph are weights, though no layer's own: parameters, and what forward computes of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hf_qat.graph.nodes import is_floating
from hf_qat.graph.rules import Kind, Rule, rule_of, weight_axis


aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """A value that is rounded as a weight is.

    Attributes:
        axis: output channels run along it; `None` where they do not run along one axis.
        user: the operation that multiplies by it.
    """

    axis: int | None
    user: fx.Node


def find_weights(
    nodes: Collection[fx.Node], rules: Mapping[fx.Node, Rule], static: Collection[fx.Node]
) -> dict[fx.Node, Weight]:
    """The values that are weights of what a graph computes on codes, in the order of their use.

    What only hands a weight on (a transpose, a slice) comes after the rounding, if its channels can be followed.

    Args:
        nodes: of the graph, in order.
        rules: of each of them.
        static: those that depend on no data.
    """
    found: dict[fx.Node, Weight] = {}
    fixed = _fixed(nodes)
    for node in nodes:
        for operand, axis in _factors(node, rules):
            if operand in static:
                root, axis = _root(operand, axis, rules)
                if root not in fixed:
                    continue
                first = found.setdefault(root, Weight(axis, node))
                if first.axis != axis:
                    found[root] = Weight(None, first.user)  # channels of one user are the inputs of another
    return found


def _fixed(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """What parameters and constants alone decide; queries that are repeated for each image depend on the batch."""
    fixed: set[fx.Node] = set()
    for node in nodes:
        computed = node.op in ("call_function", "call_module") and bool(node.all_input_nodes)
        if node.op == "get_attr" or (computed and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _factors(node: fx.Node, rules: Mapping[fx.Node, Rule]) -> Iterator[tuple[fx.Node, int | None]]:
    """The operands that an operation may have as a weight, and the axis of the output channels of each."""
    if rules[node].kind is not Kind.COMPUTE:
        return
    if rule_of(node).kind is Kind.LAYER and isinstance(node.args[1], fx.Node):
        yield node.args[1], weight_axis(node)
    elif rules[node].is_activation_product:
        # Integer kernels take one scale for the left operand, and one per column for a right one that is a matrix.
        for position, operand in enumerate(node.args[:2]):
            if isinstance(operand, fx.Node) and is_floating(operand):
                yield operand, 1 if position == 1 and operand.meta["val"].dim() == 2 else None


def _root(node: fx.Node, axis: int | None, rules: Mapping[fx.Node, Rule]) -> tuple[fx.Node, int | None]:
    """Back through what hands a weight on, for as long as its channels can be followed."""
    while rules[node].kind is Kind.PASS and isinstance(node.args[0], fx.Node) and node.target in _CHANNELS_BEFORE:
        axis = None if axis is None else _CHANNELS_BEFORE[node.target](node, axis)
        node = node.args[0]
    return node, axis


def _same(node: fx.Node, axis: int) -> int:
    return axis


def _transposed(node: fx.Node, axis: int) -> int:
    arguments: Any = node.args
    rank = node.meta["val"].dim()
    one, other = (0, 1) if node.target is aten.t.default else (arguments[1] % rank, arguments[2] % rank)
    return {one: other, other: one}.get(axis, axis)


def _permuted(node: fx.Node, axis: int) -> int:
    order: Any = node.args[1]
    return int(order[axis]) % len(order)


#: Operation that keeps every value of a channel together → where its channels were before.
_CHANNELS_BEFORE: dict[Any, Callable[[fx.Node, int], int]] = {
    **dict.fromkeys((aten.t.default, aten.transpose.int, aten.swapaxes.default), _transposed),
    aten.permute.default: _permuted,
    **dict.fromkeys((aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default), _same),
    **dict.fromkeys((aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default), _same),
    **dict.fromkeys((aten.chunk.default, operator.getitem), _same),
}
