"""Stable names of quantizers: from module paths and ordinals within a module, never from node numbers.

`layer.1.convolution.activation_quantizer` (a layer's output), `layers.0.add_0_quantizer` (the first addition in the
forward of `layers.0`), `pixel_values_quantizer` (an input), `embeddings.position_embeddings_quantizer` (a parameter),
`stem.weight_quantizer` (a weight that is computed for `stem`).
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from hf_qat.graph.nodes import module_path, operation_name
from hf_qat.graph.passes.graph_facts import GraphFacts
from hf_qat.graph.plan import join_path
from hf_qat.graph.rules import Kind


def quantizer_names(facts: GraphFacts, insertion_points: list[fx.Node]) -> dict[fx.Node, str]:
    """Insertion point → path of its quantizer below the captured child."""
    arguments = facts.captured.signature.tensor_names()
    ordinals, single = _ordinals(facts), _single_operations(facts, insertion_points)
    computed: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    for point in insertion_points:
        if point.op == "placeholder":
            names[point] = f"{arguments[facts.placeholders.index(point)]}_quantizer"
        elif point.op == "get_attr":
            names[point] = f"{point.target}_quantizer"
        elif point in facts.weights:
            owner = module_path(facts.weights[point].user)
            names[point] = join_path(owner, "weight_quantizer" + (f"_{n}" if (n := computed[owner]) else ""))
            computed[owner] += 1
        else:
            names[point] = _after_operation(facts, _fused_to(facts, point), ordinals, single)
    taken: set[str] = set()
    for point, name in names.items():
        names[point] = _free_name(facts, name, taken)
        taken.add(names[point])
    return names


def _free_name(facts: GraphFacts, name: str, taken: set[str]) -> str:
    """`name`, with a number where its module has an attribute of that name already: the model's own stay."""
    owner, _, last = name.rpartition(".")
    module, free, number = facts.captured.get_submodule(owner), last, 0
    while hasattr(module, free) or join_path(owner, free) in taken:
        number += 1
        free = f"{last}_{number}"
    return join_path(owner, free)


def _fused_to(facts: GraphFacts, point: fx.Node) -> fx.Node:
    """The operation that an activation or a factor is fused to, and named after."""
    while isinstance(point.args[0], fx.Node) and facts.fuses_into_next(point.args[0]):
        point = point.args[0]
    return point


def _after_operation(facts: GraphFacts, node: fx.Node, ordinals: dict[fx.Node, int], single: set[str]) -> str:
    owner, ordinal = module_path(node), ordinals[node]
    if facts.rules[node].kind is Kind.LAYER or owner in single:
        return join_path(owner, "activation_quantizer" + (f"_{ordinal}" if ordinal else ""))
    return join_path(owner, f"{_operation(facts, node)}_{ordinal}_quantizer")


def _single_operations(facts: GraphFacts, insertion_points: list[fx.Node]) -> set[str]:
    """Paths of modules without children that are one operation (`nn.GELU`, `nn.LayerNorm`): it needs no name."""
    operations: dict[str, set[str]] = {}
    calls = {point for point in insertion_points if point.op.startswith("call")}
    for node in facts.nodes:
        if facts.is_quantized(node) or node in calls:
            operations.setdefault(module_path(node), set()).add(_operation(facts, node))
    return {path for path, names in operations.items() if len(names) == 1 and _is_leaf(facts, path)}


def _is_leaf(facts: GraphFacts, path: str) -> bool:
    return not any(True for _ in facts.captured.get_submodule(path).children())


def _operation(facts: GraphFacts, node: fx.Node) -> str:
    name = facts.rules[node].name
    return operation_name(node) if name in ("float", "layer") else name


def _ordinals(facts: GraphFacts) -> dict[fx.Node, int]:
    """How many operations of the same name the node's module has called before it."""
    counts: Counter[tuple[str, str]] = Counter()
    ordinals: dict[fx.Node, int] = {}
    for node in facts.nodes:
        if node.op in ("call_function", "call_module"):
            key = (module_path(node), _operation(facts, node))
            ordinals[node] = counts[key]
            counts[key] += 1
    return ordinals
