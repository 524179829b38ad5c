from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from hf_qat.export.cleanup import drop_unused_values
from hf_qat.tidl.adapt import adapt
from tests.tidl.layers import from_text


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


CODES = "int8[1, 1, 4] c = {1, 2, 3, 4}, float s = {0.5}, int8 o = {0}"

#: What the exporter writes → operators that must be gone or there.
CASES = {
    "reshape": (
        "g (float[1, 3, 4] x) => (float[1, 12] z) <int64[2] s = {1, -1}> { z = Reshape<allowzero=1>(x, s) }",
        ["Reshape"],
    ),
    "gather": (
        "g (float[1, 3, 4] x) => (float[1, 4] z) <int64 i = {-1}> { z = Gather<axis=1>(x, i) }",
        ["Gather", "Reshape"],
    ),
    "expand once": (
        f"g (float[1, 3, 4] x) => (float[1, 4, 4] z) <{CODES}, int64[3] n = {{1, 1, 1}}> {{ "
        "d = DequantizeLinear(c, s, o) e = Expand(d, n) z = Concat<axis=1>(e, x) }",
        ["DequantizeLinear", "Concat"],
    ),
    "expand": (
        f"g (float[1, 3, 4] x) => (float[1, 5, 4] z) <{CODES}, int64[3] n = {{1, 2, 1}}> {{ "
        "d = DequantizeLinear(c, s, o) e = Expand(d, n) z = Concat<axis=1>(e, x) }",
        ["DequantizeLinear", "DequantizeLinear", "Concat"],
    ),
    "quantized gather": (
        "g (float[1, 3, 4] x) => (float[1, 4] z) <int64 i = {-1}, float s = {0.5}, uint8 o = {7}> { "
        "q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o) z = Gather<axis=1>(d, i) }",
        [
            "QuantizeLinear",
            "DequantizeLinear",
            "Gather",
            "QuantizeLinear",
            "DequantizeLinear",
            "Reshape",
        ],
    ),
    "gather by a vector": (
        "g (float[1, 3, 4] x) => (float[1, 2, 4] z) <int64[2] i = {0, 2}> { z = Gather<axis=1>(x, i) }",
        ["Gather"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_adapted_model_computes_the_same(case):
    text, operators = CASES[case]
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    expected = run(from_text(text), x)
    adapted = adapt(from_text(text))
    drop_unused_values(adapted)
    onnx.checker.check_model(adapted, full_check=True)
    np.testing.assert_array_equal(run(adapted, x), expected)
    assert [node.op_type for node in adapted.graph.node] == operators


def test_a_reshape_gets_its_sizes_and_loses_allowzero():
    node, *_ = (adapted := adapt(from_text(CASES["reshape"][0]))).graph.node
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in adapted.graph.initializer}
    assert tensors[node.input[1]].tolist() == [1, 12]
    assert not node.attribute


def test_what_nothing_reads_is_dropped_and_all_else_is_kept():
    adapted = adapt(from_text(CASES["reshape"][0]))
    assert len(adapted.graph.initializer) == 2
    drop_unused_values(adapted)
    assert [tensor.name for tensor in adapted.graph.initializer] == [adapted.graph.node[0].input[1]]
