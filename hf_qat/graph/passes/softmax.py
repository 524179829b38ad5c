"""What stands around a softmax: the masks and position biases before it, the length of its rows, what reads it.

A quantizer on scores with a mask of -1e9 would have no resolution left for the scores. So the scores are rounded
before anything is added to them, and the mask goes through in float: it belongs to the softmax.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from hf_qat.graph.nodes import is_floating
from hf_qat.graph.rules import SIZES, Kind, Rule, is_scalar_multiple, rule_of


aten = torch.ops.aten

#: Operations that choose between the scores and a number.
SELECTIONS = {
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}

#: Operations of two operands, one of which may be a position bias, or a mask.
SUMS = {aten.add.Tensor, aten.sub.Tensor}

#: Operations of two operands, one of which may be a mask: a parameter there is a temperature, and is quantized.
PRODUCTS = {aten.mul.Tensor}

#: Rows of probabilities up to this length may have the fixed scale 1/256: rounding a flat row of 32 to it costs 3.5 %
#: (root of the mean square), of 48 5.7 %, of 96 13 %; of 512, half of which become 0, 96 %. With each bit less, half.
LONGEST_FIXED_ROW = 32

Rules = Mapping[fx.Node, Rule]


def find_preludes(nodes: Collection[fx.Node], rules: Rules, static: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes between scores and the softmax that they go into, which mask the scores or add a bias to them.

    Args:
        nodes: of a graph, in order.
        rules: of each of them.
        static: those that depend on no data.
    """
    computed = _computed(nodes, rules)
    prelude: set[fx.Node] = set()
    for node in nodes:
        if rules[node].is_softmax:
            prelude |= _prelude_of(node, rules, static, computed)
    return prelude


def _computed(nodes: Iterable[fx.Node], rules: Rules) -> set[fx.Node]:
    """What a layer or a product of activations has gone into: scores, as against masks."""
    found: set[fx.Node] = set()
    for node in nodes:
        layer = rules[node].kind is Kind.LAYER or rule_of(node).kind is Kind.LAYER
        if layer or rules[node].is_activation_product or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _prelude_of(
    softmax: fx.Node, rules: Rules, static: Collection[fx.Node], computed: Collection[fx.Node]
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    scaled: set[fx.Node] = set()  # `masked / sqrt(d)`: the factor comes after the mask
    node: Any = softmax.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1:
        scores: Any = _masked(node, rules, static, computed)
        if rules[node].kind is Kind.PASS:
            scores = node.args[0]
        elif scores is not None:
            found |= {node}
            found |= scaled if _is_mask(node, static) else set()
            scaled = set()
        elif is_scalar_multiple(node):
            scaled.add(node)
            scores = node.args[0]
        else:
            break
        node = scores
    return found


def _masked(node: fx.Node, rules: Rules, static: Collection[fx.Node], computed: Collection[fx.Node]) -> fx.Node | None:
    """The scores among the operands of a mask or of a sum with a position bias; `None` if it is neither."""
    if node.target not in SELECTIONS | SUMS | PRODUCTS or len(node.all_input_nodes) < 2:
        return None
    data = [n for n in node.all_input_nodes if n not in static and is_floating(n)]
    if node.target in PRODUCTS and len(data) < 2:
        return None
    if len(data) > 1:
        scores = [n for n in data if _is_product(n, rules)] or [n for n in data if n in computed]
        data = scores  # the other one is a mask
    return data[0] if len(data) == 1 else None


def _is_product(node: fx.Node, rules: Rules) -> bool:
    """Whether the value is a product of two activations, scaled and masked perhaps."""
    while rules[node].kind is Kind.PASS or is_scalar_multiple(node) or node.target in SELECTIONS | SUMS:
        if not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return rules[node].is_activation_product


def _is_mask(node: fx.Node, static: Collection[fx.Node]) -> bool:
    """Whether the node does more than add a constant."""
    data = [n for n in node.all_input_nodes if n not in static]
    return node.target in SELECTIONS or len(data) > 1


def masks_alone(
    nodes: Collection[fx.Node], prelude: Collection[fx.Node], rules: Rules, static: Collection[fx.Node]
) -> set[fx.Node]:
    """What computes a mask, such as `(1 - keep) * -1e9`, and is read by nothing but `prelude`."""
    computed = _computed(nodes, rules)
    found: set[fx.Node] = set()
    for node in reversed(list(nodes)):
        on_data = node.op == "call_function" and node not in static and node not in computed
        through = [user in prelude or user in found for user in node.users]
        if on_data and is_floating(node) and through and all(through):
            found.add(node)
    return {node for node in found if rules[node].kind is not Kind.PASS}


def has_long_rows(node: fx.Node, rule: Rule, bits: int = 8) -> bool:
    """Whether the node is a softmax whose rows are too long for a fixed scale of `bits`, or of unknown length."""
    if not rule.is_softmax:
        return False
    axis = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    length = node.meta["val"].shape[axis]
    return not isinstance(length, int) or length > LONGEST_FIXED_ROW * 2.0 ** (bits - 8)


def long_results(nodes: Iterable[fx.Node], rules: Rules) -> set[fx.Node]:
    """The softmaxes of long rows whose probabilities the graph only returns, or compares and selects before.

    A place where the scores of a neighbourhood are largest, as detectors of key points look for, is lost where
    rounding makes neighbours equal.
    """
    return {node for node in nodes if has_long_rows(node, rules[node]) and _is_only_returned(node, rules)}


def _is_only_returned(softmax: fx.Node, rules: Rules) -> bool:
    seen, stack = {softmax}, [softmax]
    while stack:
        node = stack.pop()
        if not node.users:
            return False
        for user in node.users:
            if user.op == "output" or user.target in SIZES or _is_decision(user) or user in seen:
                continue
            if rules[user].kind is not Kind.PASS and user.target not in SELECTIONS:
                return False
            seen.add(user)
            stack.append(user)
    return True


def _is_decision(node: fx.Node) -> bool:
    """Whether a comparison, or what numbers places: its value is no real number."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()
