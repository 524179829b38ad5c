"""Which values of a graph share a quantizer: a concatenation and all that it joins, as codes are only copied there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from hf_qat.graph.passes.graph_facts import GraphFacts
from hf_qat.graph.rules import Kind


@dataclass(frozen=True)
class SharedQuantizer:
    """One quantizer of a captured child.

    Attributes:
        name: its path below the child.
        insertion_points: the nodes whose values it rounds: one, or a concatenation and what it joins.
        non_negative: all of these values are known to be ≥ 0.
    """

    name: str
    insertion_points: tuple[fx.Node, ...]
    non_negative: bool


@dataclass(frozen=True)
class Placement:
    """The quantizers of one captured child.

    Attributes:
        facts: of its graph.
        quantizers: in the order of their first insertion points.
        incoming: input position → (path of an earlier child, the quantizer there that the input has passed).
    """

    facts: GraphFacts
    quantizers: Sequence[SharedQuantizer]
    incoming: Mapping[int, tuple[str, SharedQuantizer]]

    @cached_property
    def _by_point(self) -> dict[fx.Node, SharedQuantizer]:
        return {point: quantizer for quantizer in self.quantizers for point in quantizer.insertion_points}

    def at(self, node: fx.Node) -> SharedQuantizer | None:
        """The quantizer of this child that the value of `node` has passed last."""
        return self._by_point.get(self.facts.source(node))

    def outputs(self) -> list[SharedQuantizer | None]:
        """For each output of the graph, the quantizer that it has passed last."""
        return [None if node is None else self.at(node) for node in self.facts.outputs()]


def share_along_joins(
    facts: GraphFacts, insertion_points: Sequence[fx.Node], names: Mapping[fx.Node, str]
) -> list[SharedQuantizer]:
    """The quantizers of a graph.

    Args:
        facts: of the graph.
        insertion_points: all values that are rounded, in the order of the graph.
        names: of a quantizer at each of them; that of a concatenation holds for all that share its quantizer.
    """
    leader = _leaders(facts, insertion_points)
    members: dict[fx.Node, list[fx.Node]] = {}
    for point in insertion_points:
        members.setdefault(leader[point], []).append(point)
    return [
        SharedQuantizer(names[head], tuple(points), all(map(facts.non_negative, points)))
        for head, points in members.items()
    ]


def _leaders(facts: GraphFacts, insertion_points: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Insertion point → the last concatenation that its value goes into, or itself."""
    leader = {point: point for point in insertion_points}
    for node in insertion_points:
        if facts.rules[node].kind is not Kind.JOIN:
            continue
        joined = [source for source in map(facts.source, facts.inputs_to_quantize(node)) if source in leader]
        old = {leader[source] for source in joined}
        for member in [point for point in insertion_points if leader[point] in old]:
            leader[member] = leader[node]
    return leader
