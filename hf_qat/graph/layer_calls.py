"""Which nodes of a captured graph compute with a layer's own weight."""

from __future__ import annotations

from typing import Any

from torch import fx

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.rules import Kind, rule_of


def layer_calls(captured: CapturedModule, graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes that compute with a layer's own weight and bias, in order → the layer's path below the child.

    A weight that the graph computes (a standardised or sliced one), or that something else computes with, too (a tied
    one), is no layer's own, and neither is one whose bias is tied; see `hf_qat.graph.passes.weights`.

    Args:
        captured: the child that has the layers.
        graph: a graph that reads its parameters.
    """
    calls = {}
    for node in graph.nodes:
        path = _layer_path(captured, node) if rule_of(node).kind is Kind.LAYER else None
        if path is not None:
            calls[node] = path
    read = [node for node in graph.nodes if node.op == "get_attr"]
    tied = {node.target for node in read if not node.users.keys() <= calls.keys()}
    return {node: path for node, path in calls.items() if tied.isdisjoint(_parameters(node))}


def _parameters(node: fx.Node) -> set[Any]:
    """Paths of what a layer's call computes with beside its input."""
    return {parameter.target for parameter in node.all_input_nodes[1:]}


def _layer_path(captured: CapturedModule, node: fx.Node) -> str | None:
    """Path of the module whose `weight` and `bias` the node uses; `None` if they are not one module's own."""
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or set(node.all_input_nodes[3:]):
        return None
    path, _, name = str(weight.target).rpartition(".")
    module: Any = captured.get_submodule(path)
    if name != "weight" or isinstance(module, CapturedModule) and path:
        return None
    if not hasattr(module, "bias") or (module.bias is not None and module.bias.dim() != 1):
        return None  # no layer: a parameter of that name, or a bias that is no row of channels
    expected = f"{path}.bias" if path else "bias"
    own_bias = module.bias
    if bias is None:
        return path if own_bias is None else None
    return path if isinstance(bias, fx.Node) and bias.target == expected else None
