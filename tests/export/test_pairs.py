from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from hf_qat.export.pairs import repeat_pairs


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
