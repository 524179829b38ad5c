"""Sub-graphs that depend on no input: gone from the file, which computes the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hf_qat.export import folding
from hf_qat.export.cleanup import drop_dead_nodes, drop_unused_values
from hf_qat.export.folding import fold_constants


#: Queries: codes of a constant, repeated, with the pair that quantizes what is computed of them.
QUERIES = """g (float[1, 4] x) => (float[2, 4] z)
<float s = {0.5}, uint8 o = {3}, uint8[1, 4] c = {1, 2, 3, 250}, int64[2] n = {2, 1}, float[4] b = {0.3, 1, 2, 3}> {"""

#: What is computed of them → the operators that are left, and the type of the constant.
CASES = {
    "codes that are repeated": ("t = Tile(d, n) z = Add(x, t)", ["DequantizeLinear", "Add"], np.uint8),
    "a sum that is quantized": (
        "t = Tile(d, n) a = Add(t, b) q = QuantizeLinear(a, s, o) e = DequantizeLinear(q, s, o) z = Add(x, e)",
        ["DequantizeLinear", "Add"],
        np.uint8,
    ),
    "a sum that is not": ("t = Tile(d, n) a = Add(t, b) z = Add(x, a)", ["Add"], np.float32),
    "one constant for two": (
        "t = Tile(d, n) y = Add(x, t) w = Mul(t, y) z = Add(w, x)",
        ["DequantizeLinear", "Add", "Mul", "Add"],
        np.uint8,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_constants_decide_is_a_constant_and_codes_stay_codes(case, parse, run_onnx):
    body, operators, kind = CASES[case]
    model = parse(f"{QUERIES} d = DequantizeLinear(c, s, o) {body} }}", opset=17)
    x = np.array([[1.25, -2, 3, 4]], np.float32)
    (expected,) = run_onnx(model, x)

    fold_constants(model)
    drop_dead_nodes(model)
    drop_unused_values(model)

    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == operators
    np.testing.assert_array_equal(run_onnx(model, x)[0], expected)
    values = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert [value.dtype for value in values if value.size == 8] == [kind]
    before = model.SerializeToString()
    fold_constants(model)
    assert model.SerializeToString() == before


def test_both_parts_of_what_is_split_become_constants(parse, run_onnx):
    body = "a = Add(d, b) p, r = Split<axis = 1>(a) y = Add(x, p) w = Mul(x, r) z = Concat<axis = 0>(y, w)"
    model = parse(f"{QUERIES} d = DequantizeLinear(c, s, o) {body} }}".replace("[1, 4] x", "[1, 2] x"), opset=17)
    x = np.array([[1.25, -2]], np.float32)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    (expected,) = run_onnx(model, x)

    fold_constants(model)
    drop_dead_nodes(model)

    assert [node.op_type for node in model.graph.node] == ["Add", "Mul", "Concat"]
    np.testing.assert_array_equal(run_onnx(model, x)[0], expected)


def test_a_number_without_axes_stays_one(parse, run_onnx):
    """numpy's ascontiguousarray makes an axis for it, and the shapes that the exporter noted fit no longer."""
    model = parse(
        """g (float[2, 4] x) => (float[2, 4] z) <float s = {0.5}, uint8 o = {3}, uint8 c = {1}, float[] e, uint8[] q> {
        d = DequantizeLinear(c, s, o) t = Tanh(d) q = QuantizeLinear(t, s, o) e = DequantizeLinear(q, s, o)
        y = Mul(x, e) z = Add(y, d) }""",
        opset=17,
    )
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    (expected,) = run_onnx(model, x)

    fold_constants(model)
    drop_dead_nodes(model)

    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "DequantizeLinear", "Mul", "Add"]
    assert [list(tensor.dims) for tensor in model.graph.initializer] == [[]] * len(model.graph.initializer)
    np.testing.assert_array_equal(run_onnx(model, x)[0], expected)


@pytest.mark.parametrize(
    "body",
    [
        "t = Tile(x, n) z = Add(t, b)",
        "r = RandomNormalLike(b) z = Add(x, r)",
        "w = DequantizeLinear<axis = 0>(k, v, p) t = Transpose(w) z = MatMul(x, t)",
        "w = DequantizeLinear<axis = 0>(k, v, p) m, o = Split<axis = 0>(w) t = Transpose(m) z = MatMul(x, t)",
        "w = DequantizeLinear<axis = 0>(k, v, p) h = Add(w, b) t = Transpose(h) z = MatMul(x, t)",
        "z = Tile(b1, n)",
    ],
    ids=[
        "of an input",
        "random numbers",
        "a weight with a scale for each channel",
        "a part of one",
        "what is computed of one",
        "an output",
    ],
)
def test_all_else_stays(body, parse):
    more = "float[1, 4] b1, int8[4, 4] k, float[4] v, int8[4] p, float[4] b = {1, 2, 3, 4}, int64[2] n = {1, 1}"
    model = parse(f"g (float[1, 4] x) => (float[1, 4] z) <{more}> {{ {body} }}", opset=17)
    del model.graph.input[1:]
    for name, value in {
        "b1": np.ones((1, 4), np.float32),
        "k": np.eye(4, dtype=np.int8),
        "v": np.ones(4, np.float32),
        "p": np.zeros(4, np.int8),
    }.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    before = model.SerializeToString()
    fold_constants(model)
    assert model.SerializeToString() == before


def test_a_constant_that_would_make_the_file_grow_too_much_stays_computed(parse, monkeypatch):
    model = parse(
        """g (float[1, 4] x) => (float[1, 4] z) <float[1] one = {1}, int64[2] many = {64, 4},
        int64[2] few = {1, 4}> { a = Expand(one, many) m = ReduceMax<axes = [0]>(x) b = Expand(one, few)
        c = Add(x, b) d = Add(c, m) e = Add(d, a) z = ReduceMax<axes = [0]>(e) }""",
        opset=17,
    )
    monkeypatch.setattr(folding, "LARGEST_GROWTH", 64)
    fold_constants(model)
    drop_dead_nodes(model)
    assert [node.op_type for node in model.graph.node] == ["Expand", "ReduceMax", "Add", "Add", "Add", "ReduceMax"]


@pytest.mark.slow
def test_a_detector_keeps_nothing_that_depends_on_no_pixel(exported):
    _, report = exported("detr")
    model = onnx.load(report.path)
    fixed = {tensor.name for tensor in model.graph.initializer}
    left = [node for node in model.graph.node if fixed.issuperset(name for name in node.input if name)]
    assert {node.op_type for node in left} == {"DequantizeLinear"}
    assert "Tile" not in {node.op_type for node in model.graph.node}
    assert report.plain.relative_error < 0.01 and report.optimized.relative_error < 0.05
