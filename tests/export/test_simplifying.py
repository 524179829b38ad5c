"""Against onnxscript's optimizer itself."""

from __future__ import annotations

import onnx
import onnx_ir
import pytest
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.rules.common import slice_split_rule

from hf_qat.export.simplifying import _rules, simplify


INTEGERS = (
    "<int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] one = {1}, int64[2] flat = {1, -1}>"
)

GRAPHS = {
    "constants and identities": "a = Identity(x) s = Add(one, one) y = Concat<axis = 1>(a, x) u = Neg(s)",
    "two clamps": "lowest = Constant<value_float = -1.0>() highest = Constant<value_float = 1.0>() "
    "a = Clip(x, lowest, highest) b = Relu(a) y = Concat<axis = 1>(b, x)",
    "slices that are parts": "b = Slice(x, two, four, one) a = Slice(x, zero, two, one) y = Concat<axis = 1>(b, a)",
    "a chain of reshapes": "a = Reshape(x, flat) b = Reshape(a, flat) c = Reshape(b, flat) y = Concat<axis = 1>(c, c)",
    "transposes": "a = Transpose(x) b = Transpose(a) c = Identity(b) d = Transpose(c) e = Transpose(d) y = Neg(e)",
}


@pytest.mark.parametrize("body", GRAPHS.values(), ids=GRAPHS.keys())
def test_the_same_graph_comes_out_as_of_onnxscripts_optimizer(body, parse):
    graph = f"g (float[1, 4] x) => (float[1, 8] y) {INTEGERS} {{ {body} }}"
    if body.endswith("Neg(e)"):
        graph = graph.replace("float[1, 8] y", "float[1, 4] y")
    model = parse(graph)
    wanted, found = (onnx_ir.serde.deserialize_model(model) for _ in range(2))
    optimize_ir(wanted)

    simplify(found)

    assert onnx_ir.serde.serialize_model(found) == onnx_ir.serde.serialize_model(wanted)
    assert [node.op_type for node in found.graph] != [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(("count", "searched"), [(0, False), (1, False), (2, True)])
def test_slices_are_searched_for_where_there_are_some(count, searched, parse):
    body = " ".join(f"y{k} = Slice(x, zero, two, one)" for k in range(count)) + " y = Neg(x)"
    model: onnx.ModelProto = parse(f"g (float[1, 4] x) => (float[1, 4] y) {INTEGERS} {{ {body} }}")
    assert (slice_split_rule in _rules(onnx_ir.serde.deserialize_model(model))) == searched
