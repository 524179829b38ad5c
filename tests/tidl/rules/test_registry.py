"""The tables that rules are registered in."""

from __future__ import annotations

import pytest

from hf_qat.tidl.devices import find_device
from hf_qat.tidl.rules import GRAPH_RULES, LAYER_RULES, registry
from hf_qat.tidl.rules.registry import Finding, graph_rule, layer_rule, newer_tools, operator_source
from tests.tidl.layers import findings, one_layer
from tests.tidl.planted import IMAGE


@pytest.fixture
def tables(monkeypatch):
    """The tables, to be changed."""
    layers = {operator: list(rules) for operator, rules in LAYER_RULES.items()}
    monkeypatch.setattr("hf_qat.tidl.check.LAYER_RULES", layers)
    monkeypatch.setattr(registry, "LAYER_RULES", layers)
    graphs = list(GRAPH_RULES)
    monkeypatch.setattr("hf_qat.tidl.check.GRAPH_RULES", graphs)
    monkeypatch.setattr(registry, "GRAPH_RULES", graphs)


def test_a_rule_is_asked_about_the_layers_that_it_is_registered_for(tables, saved):
    @layer_rule("Relu", "LeakyRelu")
    def named(layer, device):
        yield Finding("mine", f"{layer.name} on {device.name}", "nothing", "a document", "warning")

    assert findings(saved(one_layer("Relu", IMAGE)), "AM69A") == {"mine": "warning: layer on AM69A"}
    assert findings(saved(one_layer("Clip", IMAGE)), "AM69A") == {}


def test_a_rule_on_the_graph_is_asked_once(tables, saved):
    @graph_rule
    def counted(graph, device):
        yield Finding("mine", f"{len(graph.layers)} layers", "nothing")

    assert findings(saved(one_layer("Relu", IMAGE))) == {"mine": "arm: 1 layers"}


def test_sources_name_the_row_and_the_document():
    assert operator_source("Conv") == "edgeai-tidl-tools, docs/operators.md, Conv"
    found = newer_tools("a layer")
    assert (found.why, found.verdict) == ("tools 11.0 do not list a layer", "warning")
    assert "11_00_06_00" in found.source and find_device("AM68A").name == "AM68A"
