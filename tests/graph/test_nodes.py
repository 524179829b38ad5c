import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from hf_qat.graph.nodes import (
    MODULE_PATH,
    call_before,
    called_module,
    eliminate_dead_code,
    emitter,
    fetch,
    functional_twin,
    is_view,
    operation_name,
    output_values,
    replace_node,
    writes,
)


aten = torch.ops.aten


def call(operation, *others) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(operation, (graph.placeholder("x"), *others))


@pytest.mark.parametrize(
    ("operation", "name", "view", "written", "twin"),
    [
        (aten.conv2d.default, "conv2d", False, False, None),
        (aten.transpose.int, "transpose", True, False, None),
        (aten.add_.Tensor, "add_", False, True, aten.add.Tensor),
        (aten.copy_.default, "copy_", False, True, aten.copy.default),
    ],
    ids=str,
)
def test_what_an_operation_does_to_memory(operation, name, view, written, twin):
    node = call(operation)
    assert operation_name(node) == name
    assert (is_view(node), writes(node)) == (view, written)
    if twin is not None:
        assert functional_twin(operation) is twin


def test_an_in_place_operation_without_a_twin_has_none():
    assert functional_twin(aten.set_.source_Tensor) is aten.set.source_Tensor
    assert functional_twin(aten.resize_as_.default) is aten.resize_as.default
    assert functional_twin(aten.requires_grad_.default) is None


def test_a_getitem_has_the_name_that_python_gives_it_and_is_no_view():
    node = call(getattr, "device")
    assert operation_name(node) == "<built-in function getattr>"
    assert not is_view(node) and not writes(node)


def test_a_child_that_is_itself_the_layer_calls_its_own_method():
    owner = nn.Sequential(nn.Linear(2, 2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    output = graph.output((x,))
    inner, own = call_before(output, "0", x, {"val": 1}), call_before(output, "", x, {"val": 2})
    assert called_module(owner, inner) is owner[0] and called_module(owner, own) is owner
    assert called_module(owner, x) is None
    assert [node.meta for node in (inner, own)] == [{"val": 1, MODULE_PATH: "0"}, {"val": 2, MODULE_PATH: ""}]
    assert fetch(owner, "0.weight") is owner[0].weight


def test_emitted_nodes_stand_before_the_node_and_have_values_and_its_module():
    graph = fx.Graph()
    with FakeTensorMode() as mode:
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(2, 3)
        node = graph.call_function(aten.relu.default, (x,))
        node.meta = {"val": mode.from_tensor(torch.empty(2, 3)), MODULE_PATH: "act"}
    graph.output((node,))
    replace_node(node, emitter(graph, node)(aten.transpose.int, x, 0, 1))
    (new,) = output_values(graph)
    assert new.target is aten.transpose.int and new.meta["val"].shape == (3, 2) and new.meta[MODULE_PATH] == "act"
    assert [n.op for n in graph.nodes] == ["placeholder", "call_function", "output"]


def test_dead_code_goes_and_inputs_and_writes_stay():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.call_function(aten.neg.default, (graph.call_function(aten.relu.default, (x,)),))
    graph.call_function(aten.add_.Tensor, (x, 1.0))
    graph.output((x,))
    eliminate_dead_code(graph)
    assert [str(node.target) for node in graph.nodes] == ["x", "y", "aten.add_.Tensor", "output"]
    assert not y.users
