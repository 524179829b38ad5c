"""Placement: decide by the target's rules where a tensor is rounded and how, and insert the quantizers there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.passes.graph_facts import GraphFacts
from hf_qat.graph.passes.quantizer_names import quantizer_names
from hf_qat.graph.passes.quantizer_specs import decide_specs
from hf_qat.graph.passes.sharing import Placement, SharedQuantizer, share_along_joins
from hf_qat.graph.passes.twins import find_twins
from hf_qat.graph.plan import Plan
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.weight_quantizer import WeightQuantizer


#: Largest value of ReLU6; a quantizer that computes it must not reach further.
RELU6_LIMIT = 6.0


def place(captured: Mapping[str, CapturedModule], plan: Plan) -> None:
    """Insert fake quantizers into the graphs of `captured`, in place; layers are fused already.

    Each captured module afterwards has `output_quantizers` (a path below it, or `None`, per output),
    `incoming_quantizer` (input position → (child, path) of the quantizer that the input carries already) and
    `float_operations`.
    """
    placements: dict[str, Placement] = {}
    read = {producer for module in captured.values() for producer in module.producer_of_input.values()}
    for child, module in captured.items():
        outputs_read = {position for producer, position in read if producer == child}
        placements[child] = _find_places(module, child, plan, placements, outputs_read)
    specs = decide_specs(placements, plan)
    for child, module in captured.items():
        placement = placements[child]
        module.incoming_quantizer = {p: (other, q.name) for p, (other, q) in placement.incoming.items()}
        module.output_quantizers = [None if q is None else q.name for q in placement.outputs()]
        module.float_operations = placement.facts.float_operations()
        for quantizer in placement.quantizers:
            _add_quantizer(module, quantizer, placement.facts, specs[child, quantizer.name])
        twins = [find_twins(module.graph, way.graph) for way in module.graphs[1:]]
        call_quantizers(module.graph, placement, {node: node for node in placement.facts.nodes})
        for way, twin_of in zip(module.graphs[1:], twins, strict=True):
            call_quantizers(way.graph, placement, twin_of)
        module.recompile()


def _find_places(
    module: CapturedModule, child: str, plan: Plan, earlier: Mapping[str, Placement], outputs_read: set[int]
) -> Placement:
    """Where quantizers go in the graph of one child, and which of them share one; changes nothing."""
    incoming = {
        position: (other, quantizer)
        for position, (other, output) in module.producer_of_input.items()
        if other in earlier and (quantizer := earlier[other].outputs()[output]) is not None
    }
    non_negative = {position for position, (_, quantizer) in incoming.items() if quantizer.non_negative}
    facts = GraphFacts(module, child, plan, non_negative, outputs_read)
    points = _insertion_points(facts, {facts.placeholders[position] for position in incoming})
    quantizers = share_along_joins(facts, points, quantizer_names(facts, points))
    return Placement(facts, quantizers, incoming)


def _insertion_points(facts: GraphFacts, quantized_already: set[fx.Node]) -> list[fx.Node]:
    """In the order of the graph, the values that are rounded: results, and inputs of what computes on codes."""
    found = set(facts.insertion_points())
    for node in facts.nodes:
        for source in map(facts.source, facts.inputs_to_quantize(node)):
            if source not in quantized_already and not facts.is_quantized(source):
                found.add(source)
    return [node for node in facts.nodes if node in found]


def _add_quantizer(module: CapturedModule, quantizer: SharedQuantizer, facts: GraphFacts, spec: QuantizerSpec) -> None:
    """Add a `FakeQuantize` to the module that it is named after."""
    clamps = {facts.rules[node].clamp for node in quantizer.insertion_points}
    absorbs_relu6 = clamps == {"relu6"} and not spec.power_of_two and spec.qmin == 0
    limit = RELU6_LIMIT / spec.qmax if absorbs_relu6 and spec.symmetric else None
    owner, _, name = quantizer.name.rpartition(".")
    point = quantizer.insertion_points[0]
    if point in facts.weights:
        channels = None if spec.axis is None else int(point.meta["val"].shape[spec.axis])
        made: FakeQuantize = WeightQuantizer(spec, channels)
    else:
        made = FakeQuantize(spec, scale_limit=limit)
    module.get_submodule(owner).add_module(name, made)


def call_quantizers(graph: fx.Graph, placement: Placement, twin_of: Mapping[fx.Node, fx.Node]) -> None:
    """Add a call after each insertion point, in place; a clamp that the quantizer computes goes.

    Args:
        graph: is changed.
        placement: what was decided on the graph of evaluation.
        twin_of: node there → its twin in `graph`; a value that has none is not rounded.
    """
    for quantizer in placement.quantizers:
        for point in quantizer.insertion_points:
            if point in twin_of:
                _call_after(graph, twin_of[point], quantizer.name, placement.facts.rules[point].clamp)


def _call_after(graph: fx.Graph, node: fx.Node, name: str, clamp: str | None) -> None:
    argument = node if clamp is None else node.args[0]
    options: dict[str, Any] = {} if clamp is None else {"activation": clamp}
    # All inputs stay before the first operation.
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(inputs[-1] if node in inputs else node):
        call = graph.create_node("call_module", name, (argument,), options)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    if clamp is not None:
        graph.erase_node(node)
