from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from hf_qat.export.pairs import WITH_PAIR, repeat_pairs


def model_of(body: str, out: str = "float[1, 2, 2, 2]", zero: int = 3) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2, 4, 4] x) => ({out} z)
        <float s = {{0.1}}, uint8 o = {{{zero}}}, int64[2] k = {{1, 8}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o) {body} }}"""
    )


def run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(scale=9, size=(1, 2, 4, 4)).astype(np.float32)
    return session.run(None, {"x": x})[0]


POOL = "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)"
PAIR = ["QuantizeLinear", "DequantizeLinear"]

#: What follows the first pair → the operators that must follow it then.
CASES = {
    "a pool at the end": (f"z = {POOL}", "float[1, 2, 2, 2]", ["MaxPool", *PAIR]),
    "a pool and a sum": (f"p = {POOL} z = Add(p, p)", "float[1, 2, 2, 2]", ["MaxPool", *PAIR, "Add"]),
    "a pool and a reshape": (
        f"p = {POOL} z = Reshape(p, k)",
        "float[1, 8]",
        ["MaxPool", *PAIR, "Reshape", *PAIR],
    ),
    "a pool with a pair": (
        f"p = {POOL} r = QuantizeLinear(p, s, o) z = DequantizeLinear(r, s, o)",
        "float[1, 2, 2, 2]",
        ["MaxPool", *PAIR],
    ),
    "a pool of float numbers": (
        f"e = Exp(d) z = {POOL.replace('(d)', '(e)')}",
        "float[1, 2, 2, 2]",
        ["Exp", "MaxPool"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_repeated_and_change_no_number(case):
    body, out, operators = CASES[case]
    model = model_of(body, out)
    wanted = run(model)
    repeat_pairs(model, {"MaxPool", "Reshape"})
    np.testing.assert_array_equal(run(model), wanted)
    assert [node.op_type for node in model.graph.node] == [*PAIR, *operators]
    assert model.graph.output[0].name == "z"
    again = model.SerializeToString()
    repeat_pairs(model, {"MaxPool", "Reshape"})
    assert model.SerializeToString() == again


#: An operator that moves numbers → how it is written, channels after it, operators of the pair's own that it gets.
MOVING = {
    "MaxPool": ("MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)", 2),
    "Resize": (
        'Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
        "(d, , factors)",
        2,
    ),
    "DepthToSpace": ("DepthToSpace<blocksize = 1>(d)", 2),
    "SpaceToDepth": ("SpaceToDepth<blocksize = 2>(d)", 8),
    "Gather": ("Gather<axis = 2>(d, rows)", 2),
    "Expand": ("Expand(d, size)", 2),
    "Tile": ("Tile(d, times)", 2),
    "ReduceMax": ("ReduceMax<axes = [2]>(d)", 2),
    "ReduceMin": ("ReduceMin<axes = [2]>(d)", 2),
    "Split": ("Split<axis = 1>(d)", 1),
}


def before_a_convolution(operator: str) -> onnx.ModelProto:
    """The operator between a quantized input and a quantized convolution."""
    written, channels = MOVING[operator]
    codes = ", ".join(str(k % 7 - 3) for k in range(4 * channels))
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2, 4, 4] x) => (float[N, C, H, W] z)
        <float s = {{0.1}}, uint8 o = {{128}}, float ws = {{0.5}}, int8 wz = {{0}}, int64[2] rows = {{0, 3}},
         int8[4, {channels}, 1, 1] w = {{{codes}}}, float[4] factors = {{1, 1, 2, 2}}, int64[4] size = {{2, 2, 4, 4}},
         int64[4] times = {{1, 1, 2, 1}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o)
            {"m, n" if operator == "Split" else "m"} = {written}
            v = DequantizeLinear(w, ws, wz) c = Conv(m, v)
            r = QuantizeLinear(c, s, o) z = DequantizeLinear(r, s, o) }}"""
    )


def optimized(model: onnx.ModelProto, directory) -> list[str]:
    """The operators that ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(directory / "optimized.onnx").graph.node]


def test_what_the_table_has_is_tried_here():
    assert set(MOVING) == WITH_PAIR


@pytest.mark.parametrize("operator", MOVING)
def test_onnx_runtime_then_computes_the_convolution_after_it_in_integers(operator, tmp_path):
    model = before_a_convolution(operator)
    wanted = run(model)
    in_integers = "QLinearConv" in optimized(model, tmp_path)
    assert in_integers == (operator == "MaxPool")  # which has a pair because TI writes one
    repeat_pairs(model)
    np.testing.assert_array_equal(run(model), wanted)
    assert "QLinearConv" in optimized(model, tmp_path) and "Conv" not in optimized(model, tmp_path)


def test_interpolation_makes_new_numbers_and_gets_no_pair():
    model = before_a_convolution("Resize")
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    for attribute in resize.attribute:
        if attribute.name == "mode":
            attribute.s = b"linear"
    before = model.SerializeToString()
    repeat_pairs(model)
    assert model.SerializeToString() == before


def test_a_pair_after_the_change_of_shape_that_follows_is_enough():
    text = f"p = {POOL} f = Reshape(p, k) r = QuantizeLinear(f, s, o) z = DequantizeLinear(r, s, o)"
    model = model_of(text, "float[1, 8]")
    before = model.SerializeToString()
    repeat_pairs(model)
    assert model.SerializeToString() == before


def test_every_part_of_a_split_gets_a_pair():
    model = model_of("a, b = Split<axis = 1>(d) z = Add(a, b)", "float[1, 1, 4, 4]")
    wanted = run(model)
    repeat_pairs(model)
    np.testing.assert_array_equal(run(model), wanted)
    assert [node.op_type for node in model.graph.node] == [*PAIR, "Split", *PAIR, *PAIR, "Add"]
