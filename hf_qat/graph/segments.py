"""A graph cut into pieces that are computed one after the other: those of a model's blocks, and what lies between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from hf_qat.graph.generated_code import function_of
from hf_qat.graph.nodes import SETTINGS, module_path, writes


@dataclass(frozen=True)
class Segment:
    """Nodes of a graph that follow each other.

    Attributes:
        block: path of the module that they belong to; `None`: to what lies between blocks.
        reads: names of the values of earlier segments, or inputs, that it computes with.
        gives: names of its values that later ones, or the output, read.
        forgets: names of the values that are read for the last time here.
        called: paths of the modules that it calls.
        run: called with the module that owns the graph and what it reads; returns what it gives.
    """

    block: str | None
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    forgets: tuple[str, ...]
    called: frozenset[str]
    run: Callable[..., Any]


def cut(graph: fx.Graph, blocks: Collection[str], exchanged: Mapping[Any, Callable[..., Any]]) -> list[Segment]:
    """The segments of a graph, in order; together they give all that it returns.

    A block that changes a setting for what comes after it, or writes to what it has not made, is none: it cannot be
    computed twice.

    Args:
        graph: stays as it is.
        blocks: paths, relative to the module that owns the graph.
        exchanged: as for `function_of`.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    pieces = [(block, piece) for block, piece in _pieces(nodes, blocks) if piece]
    output = next(node for node in graph.nodes if node.op == "output")
    segments = []
    for k, (block, piece) in enumerate(pieces):
        later = [node for _, other in pieces[k + 1 :] for node in other] + [output]
        segments.append(_segment(block, piece, later, exchanged))
    return segments


def _pieces(nodes: Sequence[fx.Node], blocks: Collection[str]) -> list[tuple[str | None, list[fx.Node]]]:
    """The nodes from the first one of each block to the next block, or to the last one of the last block."""
    owners = [_owner(node, blocks) for node in nodes]
    found = [block for block in dict.fromkeys(owners) if block is not None]
    if not found:
        return [(None, list(nodes))]
    starts = [owners.index(block) for block in found]
    end = len(owners) - owners[::-1].index(found[-1])
    pieces: list[tuple[str | None, list[fx.Node]]] = [(None, list(nodes[: starts[0]]))]
    for block, (start, stop) in zip(found, pairwise([*starts, max(end, starts[-1] + 1)]), strict=True):
        piece = list(nodes[start:stop])
        pieces.append((block if _can_run_twice(piece) else None, piece))
    return [*pieces, (None, list(nodes[end:]))]


def _owner(node: fx.Node, blocks: Collection[str]) -> str | None:
    """The block that a node belongs to."""
    path = module_path(node) or (str(node.target) if node.op == "call_module" else "")
    return next((block for block in blocks if path == block or path.startswith(f"{block}.")), None)


def _can_run_twice(piece: Sequence[fx.Node]) -> bool:
    inside = set(piece)
    return not any(
        node.target in SETTINGS or (writes(node) and not inside.issuperset(node.all_input_nodes)) for node in piece
    )


def _segment(
    block: str | None, piece: list[fx.Node], later: list[fx.Node], exchanged: Mapping[Any, Callable[..., Any]]
) -> Segment:
    inside = dict.fromkeys(piece)
    reads = list(dict.fromkeys(source for node in piece for source in node.all_input_nodes if source not in inside))
    read_later = {source for node in later for source in node.all_input_nodes}
    gives = [node for node in piece if node in read_later]
    copied, copies = fx.Graph(), {}
    for node in reads:
        copies[node] = copied.placeholder(node.name)
    for node in piece:
        copies[node] = copied.node_copy(node, lambda source: copies[source])
    copied.output(tuple(copies[node] for node in gives))
    return Segment(
        block,
        tuple(node.name for node in reads),
        tuple(node.name for node in gives),
        tuple(node.name for node in reads if node not in read_later),
        frozenset(str(node.target) for node in piece if node.op == "call_module"),
        function_of(copied, exchanged),
    )
