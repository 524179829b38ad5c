"""Twins: which node of one graph of a module computes the same value as which node of another graph of it.

A module has a graph for evaluation and one for training. Both run the same Python code, so most operations stand in
both; training adds randomness and what only a loss needs. A quantizer that is decided on in evaluation belongs to the
twin of its value in training. Nodes are matched by the module that they stand in, the operation, and the ordinal among
the operations of that name there.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import fx

from hf_qat.graph.captured_graph import ARGUMENT
from hf_qat.graph.nodes import module_path, operation_name


#: Module path and operation.
Key = tuple[str, str]


def find_twins(reference: fx.Graph, other: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes of `reference` that have a twin in `other` → that twin.

    Args:
        reference, other: graphs of one module, after the same passes; inputs are matched by their names.
    """
    ours, theirs = _by_key(reference), _by_key(other)
    twins: dict[fx.Node, fx.Node] = {}
    for key, nodes in ours.items():
        candidates = theirs.get(key, [])
        if len(candidates) == len(nodes):
            twins |= dict(zip(nodes, candidates, strict=True))
        else:
            twins |= _aligned(nodes, candidates)
    return twins


def _by_key(graph: fx.Graph) -> dict[Key, list[fx.Node]]:
    """The nodes of each operation in each module, in order."""
    found: dict[Key, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "output":
            found.setdefault(_key(node), []).append(node)
    return found


def _key(node: fx.Node) -> Key:
    if node.op == "call_function":
        return module_path(node), operation_name(node)
    return node.op, str(node.meta.get(ARGUMENT, node.target))


def _aligned(nodes: Sequence[fx.Node], candidates: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Pairs of the longest common sequence, by what the operations are given."""
    matcher = SequenceMatcher(None, [*map(_given, nodes)], [*map(_given, candidates)], autojunk=False)
    pairs = [(a + k, b + k) for a, b, size in matcher.get_matching_blocks() for k in range(size)]
    return {nodes[ours]: candidates[theirs] for ours, theirs in pairs}


def _given(node: fx.Node) -> tuple[Any, ...]:
    """Where the arguments come from, and the numbers among them; the inputs of randomness are not looked through."""
    return tuple(_key(value) if isinstance(value, fx.Node) else str(value) for value in node.args)
