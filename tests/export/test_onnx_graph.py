"""What is read of an ONNX graph, from models in ONNX' own text format."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_qat.export.onnx_graph import (
    OnnxGraph,
    constant_value,
    get_attribute,
    names_read,
    opset_of,
    replace_values,
    subgraphs,
    take_attribute,
    with_shapes,
)


BRANCHES = """g (bool c, float[N, 3] x) => (float[N, 3] y) <float[3] b = {1.0, 2.0, 3.0}> {
    s = Add(x, b)
    y = If(c) <
        then_branch = t () => (float[N, 3] u) { two = Constant <value_float = 2.0> () u = Mul(s, two) },
        else_branch = e () => (float[N, 3] v) { v = Identity(s) }
    >
}"""


@pytest.fixture
def model(parse) -> onnx.ModelProto:
    return with_shapes(parse(BRANCHES))


def test_shapes_types_and_constants_are_those_of_the_model(model: onnx.ModelProto):
    graph = OnnxGraph(model.graph)
    assert graph.shape("s") == (None, 3) and graph.shape("b") == (3,) and graph.shape("absent") is None
    assert graph.element_type("c") == TensorProto.BOOL and graph.element_type("s") == TensorProto.FLOAT
    np.testing.assert_array_equal(graph.constant("b"), np.float32([1, 2, 3]))
    assert graph.constant("s") is None and graph.tensor("s") is None and graph.element_type("absent") is None


def test_a_subgraph_sees_its_own_values_and_those_around_it(model: onnx.ModelProto):
    outer = OnnxGraph(model.graph)
    then_branch, _ = subgraphs(model.graph.node[1])
    inner = OnnxGraph(then_branch, outer)
    assert inner.constant("two") == 2.0 and outer.constant("two") is None
    np.testing.assert_array_equal(inner.constant("b"), np.float32([1, 2, 3]))
    assert inner.shape("s") == (None, 3)


def test_a_fresh_name_is_none_of_the_graph_or_the_graphs_around_it_and_given_once(model: onnx.ModelProto):
    outer = OnnxGraph(model.graph)
    inner = OnnxGraph(next(subgraphs(model.graph.node[1])), outer)
    assert [inner.fresh("s"), inner.fresh("s"), inner.fresh("new"), inner.fresh("two")] == [
        "s_1",
        "s_2",
        "new",
        "two_1",
    ]


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value": helper.make_tensor("", TensorProto.INT8, [2], [1, -1])}, np.int8([1, -1])),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [1, 2]}, np.int64([1, 2])),
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_floats": [0.5]}, np.float32([0.5])),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_constants_are_read_from_every_numeric_attribute(attribute: dict, expected: np.ndarray):
    tensor = constant_value(helper.make_node("Constant", [], ["c"], **attribute))
    value = onnx.numpy_helper.to_array(tensor)
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected)


def test_other_nodes_and_texts_are_no_constants():
    assert constant_value(helper.make_node("Identity", ["x"], ["y"])) is None
    assert constant_value(helper.make_node("Constant", [], ["c"], value_string="text")) is None


def test_values_read_inside_of_branches_count_and_are_replaced_there_too(model: onnx.ModelProto):
    assert set(names_read(model.graph.node)) == {"x", "b", "c", "s", "two", "u", "v"}
    replace_values(model.graph, {"s": "renamed"})
    assert "s" not in set(names_read(model.graph.node))
    assert {"renamed", "two"} <= set(names_read(next(subgraphs(model.graph.node[1])).node))


def test_an_attribute_is_read_or_taken():
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    assert get_attribute(node, "axis") == 1 and get_attribute(node, "absent") is None
    assert take_attribute(node, "axis") == 1 and take_attribute(node, "axis") is None and not node.attribute


def test_the_opset_is_the_one_of_the_default_domain(parse):
    graph = "g (float[1] x) => (float[1] y) { y = Relu(x) }"
    assert opset_of(parse(graph, opset=17, imports=', "com.microsoft": 1')) == 17
    assert opset_of(onnx.ModelProto()) == 0


def test_shapes_are_inferred_as_by_onnx_and_weights_stay(parse):
    model = parse("g (float[N, 256] x) => (float[K, M, 8] y) { z = MatMul(x, weight) y = Reshape(z, shape) }")
    weight = np.random.default_rng(0).standard_normal((256, 128), np.float32)  # 128 KiB
    for name, values in (("weight", weight), ("shape", np.array([0, -1, 8]))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    before = model.SerializeToString()

    found = with_shapes(model)

    assert found == onnx.shape_inference.infer_shapes(model, data_prop=True)
    assert np.array_equal(numpy_helper.to_array(found.graph.initializer[0]), weight)
    assert model.SerializeToString() == before
