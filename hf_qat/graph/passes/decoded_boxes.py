"""What detectors make of what their last layers say: boxes of grids, anchors and strides, joined with scores or not.

One scale for pixels and for [0, 1] would round all scores to 0, and a box on 640 pixels would have 256 places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor, fx

from hf_qat.graph.rules import BEFORE_ERROR_AMPLIFYING, Kind, Rule


Rules = Mapping[fx.Node, Rule]

#: What hands values on, or is in float already.
TRANSPARENT = (Kind.PASS, Kind.JOIN, Kind.FLOAT)


def decoded_boxes(
    nodes: Sequence[fx.Node],
    rules: Rules,
    source: Callable[[fx.Node], fx.Node],
    static: Collection[fx.Node],
    trained: Collection[fx.Node],
    handed_on: Collection[fx.Node],
) -> set[fx.Node]:
    """Arithmetic with a grid or anchors after the last layers, concatenations of scores and boxes, and what is around.

    Layers, sigmoids and softmaxes before it stay quantized, each with a range of its own. The arithmetic would leave a
    box on 640 pixels no more than 256 places, 2.5 pixels apart, after each of its steps.

    Args:
        nodes: of a graph, in order.
        rules: of each of them.
        source: a value → where it comes from, back through whatever hands it on.
        static: the nodes that depend on no data.
        trained: those of them that depend on parameters: no grid does.
        handed_on: what later parts of the model read.
    """
    grids = set(static).difference(trained)
    tail = _tail(nodes, rules, handed_on)
    sorts = _sorts(nodes, rules, source, static)
    stack = []
    for node in nodes:
        parts = [source(part) for part in node.all_input_nodes if part not in static]
        joins = rules[node].kind is Kind.JOIN and len({sorts.get(part) for part in parts}) > 1
        decodes = sorts.get(node) == "place" and _reads_constants(node, grids)
        if node in tail and (joins or decodes):
            stack.append(node)
    found: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in tail and node not in found and node not in static:
            found.add(node)
            stack += (*node.all_input_nodes, *node.users)
    return {node for node in found if rules[node].kind in (Kind.COMPUTE, Kind.ACTIVATION, Kind.JOIN)}


def _tail(nodes: Sequence[fx.Node], rules: Rules, handed_on: Collection[fx.Node]) -> set[fx.Node]:
    """Simple arithmetic and what hands values on, where nothing else comes after."""
    tail: set[fx.Node] = set()
    for node in reversed(nodes):
        simple = rules[node].kind in TRANSPARENT or rules[node].name in BEFORE_ERROR_AMPLIFYING
        is_last = node not in handed_on and all(user in tail or user.op == "output" for user in node.users)
        if node.op == "call_function" and simple and is_last:
            tail.add(node)
    return tail


def _sorts(
    nodes: Sequence[fx.Node], rules: Rules, source: Callable[[fx.Node], fx.Node], static: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """Which values are scores, in [0, 1], and which are places: sums and products with anchors, grids or strides."""
    sorts: dict[fx.Node, str] = {}
    for node in nodes:
        rule = rules[node]
        read = [sorts.get(source(given)) for given in node.all_input_nodes if given not in static]
        keeps = rule.kind is Kind.JOIN or (rule.name == "mul" and len(read) == 2)
        if rule.unit_range or (keeps and set(read) == {"score"}):
            sorts[node] = "score"
        elif rule.name in BEFORE_ERROR_AMPLIFYING and ("place" in read or _reads_constants(node, static)):
            sorts[node] = "place"
        elif rule.kind is Kind.JOIN and set(read) == {"place"}:
            sorts[node] = "place"
    return sorts


def _reads_constants(node: fx.Node, static: Collection[fx.Node]) -> bool:
    """Whether it has an operand that is no single number and depends on no data."""
    values = [given.meta.get("val") for given in node.all_input_nodes if given in static]
    return any(isinstance(value, Tensor) and value.dim() > 0 for value in values)
