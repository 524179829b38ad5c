from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.export.zero_points import separate_elementwise_constants, separate_zero_points
from tests.models import HUGGING_FACE


def two_convolutions() -> onnx.ModelProto:
    """Two int8 weights of 4 channels that share one zero point, and an activation that shares its own with nothing."""
    codes = ", ".join(str(16 * k - 120) for k in range(16))
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] z)
        <float s = {{0.125}}, uint8 o = {{128}}, float[4] ws = {{0.5, 0.25, 0.125, 1}}, int8[4] wz = {{0, 0, 0, 0}},
         int8[4, 4, 1, 1] v = {{{codes}}}, int8[4, 4, 1, 1] w = {{{codes}}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o)
            dv = DequantizeLinear<axis=0>(v, ws, wz) a = Conv(d, dv)
            qa = QuantizeLinear(a, s, o) da = DequantizeLinear(qa, s, o)
            dw = DequantizeLinear<axis=0>(w, ws, wz) b = Conv(da, dw)
            qb = QuantizeLinear(b, s, o) z = DequantizeLinear(qb, s, o)
        }}"""
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, **entries: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def test_onnx_runtime_can_then_make_signed_weights_unsigned():
    model = two_convolutions()
    wanted = run(model)
    with pytest.raises(Exception, match="replace the existing tensor"):
        run(model, x64quantprecision="1")
    separate_zero_points(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model, x64quantprecision="1"), wanted)
    np.testing.assert_array_equal(run(model), wanted)


def test_each_constant_has_its_own_and_activations_keep_theirs():
    model = two_convolutions()
    separate_zero_points(model)
    readers = Counter(name for node in model.graph.node for name in node.input)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            assert readers[node.input[2]] == 1 and tensors[node.input[2]].tolist() == [0] * 4
    assert readers["o"] == 6
    before = model.SerializeToString()
    separate_zero_points(model)
    assert model.SerializeToString() == before


def test_sums_that_share_a_constant_get_one_each_and_shared_weights_stay_one():
    """As DETR adds position embeddings in each of its layers. The weight is the identity: 8 steps of 1/8."""
    identity = ", ".join(str(code) for code in 8 * np.eye(4, dtype=int).ravel())
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 4] z)
        <float s = {{0.125}}, int8 o = {{0}}, int8[4] c = {{8, 16, 24, 32}}, int8[4, 4] w = {{{identity}}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o)
            dc = DequantizeLinear(c, s, o) dw = DequantizeLinear(w, s, o)
            a = Add(d, dc) qa = QuantizeLinear(a, s, o) da = DequantizeLinear(qa, s, o)
            m = MatMul(da, dw) qm = QuantizeLinear(m, s, o) dm = DequantizeLinear(qm, s, o)
            n = MatMul(dm, dw) qn = QuantizeLinear(n, s, o) dn = DequantizeLinear(qn, s, o)
            b = Add(dn, dc) qb = QuantizeLinear(b, s, o) z = DequantizeLinear(qb, s, o)
        }}"""
    )
    separate_elementwise_constants(model)
    onnx.checker.check_model(model, full_check=True)
    makers = {name: node for node in model.graph.node for name in node.output}
    addends = [makers[node.input[1]].input[0] for node in model.graph.node if node.op_type == "Add"]
    weights = [makers[node.input[1]].input[0] for node in model.graph.node if node.op_type == "MatMul"]
    assert len(set(addends)) == 2 and weights == ["w", "w"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)})
    np.testing.assert_array_equal(found, [[3.0, 6.0, 9.0, 12.0]])  # x + 2c, with c of 1, 2, 3, 4
    before = model.SerializeToString()
    separate_elementwise_constants(model)
    assert model.SerializeToString() == before


@pytest.mark.slow
def test_in_a_file_of_detr_no_two_weights_share_one(tmp_path):
    """A symmetric target has a zero point of 0 in every place."""
    case = HUGGING_FACE["detr"]
    pixels = case.pixels(2)
    model = convert(calibrate(prepare_qat(case.make().eval(), QATConfig("int8-symmetric"), pixels), [pixels]))
    export_onnx(model, tmp_path / "detr.onnx", pixels[:1])
    file = onnx.load(tmp_path / "detr.onnx")
    weights = {tensor.name for tensor in file.graph.initializer}
    points = [
        node.input[2]
        for node in file.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights and len(node.input) > 2
    ]
    assert len(points) > 20 and len(set(points)) == len(points)
    results = []
    for precision in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", precision)
        session = onnxruntime.InferenceSession(tmp_path / "detr.onnx", options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {session.get_inputs()[0].name: pixels[:1].numpy()}))
    for plain, precise in zip(*results, strict=True):
        np.testing.assert_allclose(precise, plain, atol=0.05 * np.abs(plain).max())
