"""The table of rules: functions that look at one layer, or at the whole graph, and yield what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hf_qat.tidl.devices import OPERATORS_DOC, OPERATORS_DOC_11_0, Device
from hf_qat.tidl.graph import Graph, Layer
from hf_qat.tidl.report import Verdict


@dataclass(frozen=True)
class Finding:
    """What a rule yields; see `report.Issue`."""

    rule: str
    why: str
    remedy: str
    source: str = ""
    verdict: Verdict = "arm"


LayerRule = Callable[[Layer, Device], Iterator[Finding]]
GraphRule = Callable[[Graph, Device], Iterator[Finding]]

#: ONNX operator → its rules. `rules/__init__.py` imports the files that fill it.
LAYER_RULES: dict[str, list[LayerRule]] = {}

#: Rules on the whole file.
GRAPH_RULES: list[GraphRule] = []


def layer_rule(*operators: str) -> Callable[[LayerRule], LayerRule]:
    """Register a rule for some operators."""

    def register(function: LayerRule) -> LayerRule:
        for operator in operators:
            LAYER_RULES.setdefault(operator, []).append(function)
        return function

    return register


def graph_rule(function: GraphRule) -> GraphRule:
    """Register a rule for the whole graph."""
    GRAPH_RULES.append(function)
    return function


def operator_source(operator: str) -> str:
    """The row of TI's table of operators."""
    return f"{OPERATORS_DOC}, {operator}"


def newer_tools(what: str) -> Finding:
    """A warning that tools 11.0 run on the Arm core what newer ones accelerate."""
    return Finding(
        "needs-newer-tools",
        f"tools 11.0 do not list {what}",
        "compile with newer tools, or see in the compile log where it runs",
        OPERATORS_DOC_11_0,
        "warning",
    )
