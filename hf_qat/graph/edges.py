"""Where data enter and leave a model: its inputs, its first layer, its last layers, its outputs.

Networks of few bits keep more of them there (LSQ, Esser et al. 2020, §3).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import fx, nn

from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.layer_calls import layer_calls
from hf_qat.graph.model_outputs import model_outputs
from hf_qat.graph.nodes import output_values
from hf_qat.graph.plan import Edges, Port, join_path
from hf_qat.graph.rules import SIZES, Kind, rule_of


aten = torch.ops.aten

#: The captured children of a model by path, in the order of their first call.
Captured = Mapping[str, CapturedModule]

#: A node in the graph of a captured child, by the child's path.
Place = tuple[str, fx.Node]


def find_edges(model: nn.Module, captured: Captured, inputs: Inputs, excluded: Callable[[str], bool]) -> Edges:
    """The edges of a captured model, on graphs that are not changed yet.

    Args:
        model: is run once.
        captured: its captured children by path, in the order of their first call.
        inputs: that it was captured with.
        excluded: says of a path whether that module stays float; such a layer is no first or last one.
    """
    calls = _calls(captured, excluded)
    outputs = model_outputs(model, captured, inputs)
    return Edges(
        inputs=frozenset(_inputs(captured, calls)),
        outputs=outputs,
        first_layer=next(iter(calls.values()), None),
        last_layers=frozenset(calls[call] for call in _last_calls(captured, calls, outputs)),
    )


def find_inputs(captured: Captured, excluded: Callable[[str], bool]) -> frozenset[Port]:
    """`inputs` of `find_edges`, for which the model need not run."""
    return frozenset(_inputs(captured, _calls(captured, excluded)))


def _calls(captured: Captured, excluded: Callable[[str], bool]) -> dict[Place, str]:
    """The paths of the layers that are called, in the order of the calls."""
    return {
        (child, node): join_path(child, path)
        for child, module in captured.items()
        for node, path in layer_calls(module, module.graph).items()
        if not excluded(join_path(child, path))
    }


def _inputs(captured: Captured, calls: Iterable[Place]) -> Iterator[Port]:
    """Inputs of the child that calls the first layer, and of those before it, that no other child produces."""
    first, _ = next(iter(calls), (None, None))
    for child, module in captured.items():
        for position in range(len(module.shapes)):
            if position not in module.producer_of_input:
                yield child, position
        if child == first:
            return


def _last_calls(captured: Captured, calls: Mapping[Place, str], outputs: Collection[Port]) -> set[Place]:
    """The layer calls that feed an output of the model.

    These are the ones whose values are handed on to an output, and of those that an output is computed from without
    another layer in between, the ones that no other of them depends on: in `x + layer(x)`, none before `x`.
    """
    returned = [place for output in outputs for place in _at_output(captured, output)]
    feeding = _reachable(captured, returned, lambda place: place in calls) & calls.keys()
    before = [source for place in feeding for source in _sources(captured, place)]
    earlier = _reachable(captured, before, lambda place: False)
    handed_on = _reachable(captured, returned, lambda place: place in calls or not _hands_on(place[1])) & calls.keys()
    return (feeding - earlier) | handed_on


def _hands_on(node: fx.Node) -> bool:
    """Whether the values are those of the layer before, normalised and activated at most."""
    kinds = (Kind.PASS, Kind.JOIN, Kind.ACTIVATION)
    return node.op == "placeholder" or node.target is aten.batch_norm.default or rule_of(node).kind in kinds


def _reachable(captured: Captured, starts: Iterable[Place], stops: Callable[[Place], bool]) -> set[Place]:
    """All that `starts` are computed from, themselves included, but nothing that lies before a stop."""
    stack, seen = list(starts), set()
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        if not stops(place):
            stack += _sources(captured, place)
    return seen


def _sources(captured: Captured, place: Place) -> list[Place]:
    """The nodes whose values, and not only their sizes, a node is computed from; an earlier child's for an input."""
    child, node = place
    module = captured[child]
    if node.op == "placeholder":
        producer = module.producer_of_input.get(module.evaluation.inputs().index(node))
        return [] if producer is None else _at_output(captured, producer)
    if node.target in SIZES:
        return []
    if rule_of(node).kind is Kind.PASS and isinstance(node.args[0], fx.Node):
        return [(child, node.args[0])]
    return [(child, source) for source in node.all_input_nodes]


def _at_output(captured: Captured, output: Port) -> list[Place]:
    """The node that a child returns at a position."""
    child, position = output
    value = output_values(captured[child].graph)[position]
    return [(child, value)] if isinstance(value, fx.Node) else []
