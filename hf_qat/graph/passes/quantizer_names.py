"""Stable names of quantizers: from module paths and ordinals within a module, never from node numbers.

`layer.1.convolution.activation_quantizer` (a layer's output), `layers.0.add_0_quantizer` (the first addition in the
forward of `layers.0`), `pixel_values_quantizer` (an input), `embeddings.position_embeddings_quantizer` (a parameter).
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from hf_qat.graph.passes.graph_facts import GraphFacts
from hf_qat.graph.rules import Kind


def quantizer_names(analysis: GraphFacts, insertion_points: list[fx.Node]) -> dict[fx.Node, str]:
    """Site → path of its quantizer below the captured child."""
    arguments = analysis.captured.signature.tensor_names()
    ordinals, single = _ordinals(analysis), _single_operations(analysis, insertion_points)
    names: dict[fx.Node, str] = {}
    for site in insertion_points:
        if site.op == "placeholder":
            names[site] = f"{arguments[analysis.placeholders.index(site)]}_quantizer"
        elif site.op == "get_attr":
            names[site] = f"{site.target}_quantizer"
        else:
            names[site] = _operation_name(analysis, _named_after(analysis, site), ordinals, single)
    assert len(set(names.values())) == len(names), "two quantizers of one name"
    return names


def _named_after(analysis: GraphFacts, site: fx.Node) -> fx.Node:
    """An activation or a factor is named after the operation that it is fused to."""
    while isinstance(site.args[0], fx.Node) and analysis.fuses_into_next(site.args[0]):
        site = site.args[0]
    return site


def _operation_name(analysis: GraphFacts, node: fx.Node, ordinals: dict[fx.Node, int], single: set[str]) -> str:
    owner, ordinal = analysis.owner(node), ordinals[node]
    prefix = f"{owner}." if owner else ""
    if analysis.rules[node].kind is Kind.LAYER or owner in single:
        return f"{prefix}activation_quantizer" + (f"_{ordinal}" if ordinal else "")
    return f"{prefix}{_operation(analysis, node)}_{ordinal}_quantizer"


def _single_operations(analysis: GraphFacts, insertion_points: list[fx.Node]) -> set[str]:
    """Paths of modules without children that are one operation (`nn.GELU`, `nn.LayerNorm`): it needs no name."""
    operations: dict[str, set[str]] = {}
    calls = {site for site in insertion_points if site.op.startswith("call")}
    for node in analysis.nodes:
        if analysis.is_quantized(node) or node in calls:
            operations.setdefault(analysis.owner(node), set()).add(_operation(analysis, node))
    return {path for path, names in operations.items() if len(names) == 1 and _is_leaf(analysis, path)}


def _is_leaf(analysis: GraphFacts, path: str) -> bool:
    return not any(True for _ in analysis.captured.get_submodule(path).children())


def _operation(analysis: GraphFacts, node: fx.Node) -> str:
    name = analysis.rules[node].name
    return name if name not in ("float", "layer") else str(node.target).split(".")[1 if "." in str(node.target) else 0]


def _ordinals(analysis: GraphFacts) -> dict[fx.Node, int]:
    """How many operations of the same name the node's module has called before it."""
    counts: Counter[tuple[str, str]] = Counter()
    ordinals: dict[fx.Node, int] = {}
    for node in analysis.nodes:
        if node.op in ("call_function", "call_module"):
            key = (analysis.owner(node), _operation(analysis, node))
            ordinals[node] = counts[key]
            counts[key] += 1
    return ordinals
