"""Weights that stand in a graph, rounded by a `WeightQuantizer`: their values, and their folding into constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import called_module, eliminate_dead_code, fetch
from hf_qat.quantization.weight_quantizer import QuantizedWeight, WeightQuantizer


@torch.no_grad()
def weights_in_graph(captured: CapturedModule) -> dict[str, Tensor]:
    """Path of each weight quantizer below `captured` → the weight, not rounded, that it gets in evaluation."""
    weights: dict[str, Tensor] = {}
    values: dict[fx.Node, Any] = {}
    for node in captured.graph.nodes:
        if isinstance(called_module(captured, node), WeightQuantizer):
            weights[str(node.target)] = _value(captured, node.args[0], values)
    return weights


def _value(captured: CapturedModule, node: Any, values: dict[fx.Node, Any]) -> Any:
    """What a node that depends on no input evaluates to; `values` remembers it, and those before it."""
    if node not in values:
        if node.op == "get_attr":
            values[node] = fetch(captured, str(node.target))
        else:
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: _value(captured, n, values))
            function = called_module(captured, node) if node.op == "call_module" else node.target
            values[node] = function(*arguments[0], **arguments[1])
    return values[node]


@torch.no_grad()
def fold_weights(captured: CapturedModule) -> None:
    """Exchange weight quantizers for the codes of what they get, and drop what computes it, in place."""
    weights = weights_in_graph(captured)
    if not weights:
        return
    for path, weight in weights.items():
        owner, _, name = path.rpartition(".")
        quantizer: WeightQuantizer = fetch(captured, path)
        folded = QuantizedWeight(quantizer.spec, quantizer.codes(weight), quantizer.scale)
        captured.get_submodule(owner)._modules[name] = folded
    for way in captured.graphs:
        for node in way.graph.nodes:
            if node.op == "call_module" and node.target in weights:
                node.args = ()
        eliminate_dead_code(way.graph)
    captured.recompile()
