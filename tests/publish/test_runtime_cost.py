"""What a file costs beside the same file in float: against numbers worked out in numpy, and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.publish.runtime_cost import in_float, runtime_cost


CODES = np.array([[1, -2, 3], [40, 50, -60]], np.int8)
SCALES, ZERO_POINTS = np.array([0.5, 0.01, 2.0], np.float32), np.array([0, 3, -1], np.int8)


def gemm(batch: int | str) -> onnx.ModelProto:
    """(N, 2) → (N, 3): a rounded input times a weight with a scale and a zero point for each column."""
    constants = {"codes": CODES, "scales": SCALES, "zeros": ZERO_POINTS, "step": np.float32(0.5), "zero": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"], name="x/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_float_twin_multiplies_with_what_the_codes_stand_for_and_rounds_nothing():
    twin = in_float(gemm("N"))
    assert [node.op_type for node in twin.graph.node] == ["MatMul"]
    assert [tensor.name for tensor in twin.graph.initializer] == ["w"]
    onnx.checker.check_model(twin)
    x = np.array([[0.3, -1.7], [9.0, 0.1]], np.float32)
    (found,) = onnxruntime.InferenceSession(twin.SerializeToString()).run(None, {"x": x})
    weight = (CODES.astype(np.float64) - ZERO_POINTS) * SCALES
    np.testing.assert_allclose(found, x @ weight, rtol=1e-6)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A convolution of 9,216 weights, and the file of it."""
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU()).eval(), torch.randn(2, 32, 8, 8)
    prepared = calibrate(prepare_qat(net, QATConfig("int8"), images), [images])
    converted = convert(prepared)
    export_onnx(converted, tmp_path / "model.onnx", images, dynamic_batch=True, verify=False)
    return tmp_path / "model.onnx", converted


def test_sizes_are_those_of_codes_and_of_four_bytes_each(exported):
    path, _ = exported
    (name,) = [value.name for value in onnx.load(path).graph.input]
    cost = runtime_cost(path, {name: np.zeros((1, 32, 8, 8), np.float32)}, {})
    assert cost is not None and cost.bytes == path.stat().st_size
    assert cost.float_bytes - cost.bytes == pytest.approx(3 * 9216, abs=3000)  # scales and pairs take a little
    assert 0 < cost.ms < 1000 and 0 < cost.float_ms < 1000


def test_the_twin_of_an_export_computes_what_torch_does_with_the_weights_of_the_codes(exported):
    path, converted = exported
    (layer,) = [module for module in converted.modules() if hasattr(module, "codes")]
    weight = layer.codes.double() * layer.weight_scale.double().reshape(-1, 1, 1, 1)
    bias = layer.get_buffer("bias").double() * layer.bias_scale.double()
    x = torch.randn(3, 32, 8, 8)
    session = onnxruntime.InferenceSession(in_float(onnx.load(path)).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = torch.nn.functional.conv2d(x.double(), weight, bias).relu()
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "name", "known"), [("N", "x", True), (1, "x", True), (4, "x", False), (1, "z", False)]
)
def test_a_file_is_measured_where_one_image_is_what_it_takes(batch, name, known, tmp_path):
    onnx.save(gemm(batch), tmp_path / "gemm.onnx")
    cost = runtime_cost(tmp_path / "gemm.onnx", {name: np.zeros((1, 2), np.float32)}, {})
    assert (cost is not None) == known


def test_a_file_that_takes_a_single_number_beside_the_image_is_measured(tmp_path):
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * factor

    inputs = torch.randn(2, 4), torch.tensor(0.5)
    model = convert(calibrate(prepare_qat(Scaled(4, 2).eval(), QATConfig(), inputs), [inputs]))
    export_onnx(model, tmp_path / "model.onnx", inputs)
    given = {"x": np.zeros((1, 4), np.float32), "factor": np.array(0.5, np.float32)}
    assert runtime_cost(tmp_path / "model.onnx", given, {}) is not None
