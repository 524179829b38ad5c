from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hf_qat.errors import ExportError
from hf_qat.quantization.onnx_ops import dequantize_linear, exporting_to_onnx, quantize_linear


class RoundTrip(nn.Module):
    """Quantizes and dequantizes its input, and adds a weight and a bias with one scale per channel."""

    def __init__(self, dtype: torch.dtype, qmin: int, qmax: int, zero_point: int | None) -> None:
        super().__init__()
        self.dtype, self.qmin, self.qmax = dtype, qmin, qmax
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("zero_point", None if zero_point is None else torch.tensor(zero_point, dtype=dtype))
        self.register_buffer("codes", torch.tensor([[-127, 5], [3, 127]], dtype=torch.int8))
        self.register_buffer("steps", torch.tensor([0.5, 0.125]))
        self.register_buffer("bias", torch.tensor([70_000, -3], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        codes = quantize_linear(x, self.scale, self.zero_point, self.dtype, self.qmin, self.qmax)
        assert codes.dtype == self.dtype and codes.shape == x.shape
        real = dequantize_linear(codes, self.scale, self.zero_point)
        assert real.dtype == torch.float32 and real.shape == x.shape
        weight = dequantize_linear(self.codes, self.steps, None, axis=0)
        bias = dequantize_linear(self.bias, self.steps * self.scale, None, axis=0)
        return nn.functional.linear(real, weight, bias)


def export(model: nn.Module, path: Path, **options: object) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.randn(3, 2),), path, verbose=False, **options)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


CODES = {
    "uint8": (torch.uint8, 0, 255, 7, 18),
    "int8": (torch.int8, -128, 127, None, 18),
    "int8_narrow": (torch.int8, -127, 127, 0, 18),
    "int4": (torch.int8, -8, 7, None, 18),
    "uint3": (torch.uint8, 0, 7, 2, 18),
    "int16": (torch.int16, -(2**15), 2**15 - 1, None, 21),
    "uint16": (torch.uint16, 0, 2**16 - 1, 1000, 21),
}


@pytest.mark.parametrize(("dtype", "qmin", "qmax", "zero_point", "opset"), CODES.values(), ids=CODES.keys())
def test_the_exported_operators_compute_the_formula(dtype, qmin, qmax, zero_point, opset, tmp_path):
    model = RoundTrip(dtype, qmin, qmax, zero_point)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = export(model, tmp_path / "model.onnx", opset_version=opset, dynamic_shapes=shapes)
    x = np.array([[0.125, 0.375], [-1e6, 1e6], [0.9, -0.4], [100.0, -100.0], [0.0, 0.1]], np.float32)

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (result,) = onnxruntime.InferenceSession(exported.SerializeToString(), options).run(None, {"x": x})

    zero = zero_point or 0
    real = (np.clip(np.rint(x / np.float32(0.25)) + zero, qmin, qmax) - zero) * 0.25
    steps = np.array([0.5, 0.125])
    weight = np.array([[-127, 5], [3, 127]]) * steps[:, None]
    np.testing.assert_allclose(result, real @ weight.T + np.array([70_000, -3]) * steps * 0.25, rtol=1e-6, atol=1e-4)


def test_codes_and_scales_become_initializers_that_are_not_folded(tmp_path):
    graph = export(RoundTrip(torch.uint8, 0, 255, 7), tmp_path / "model.onnx", opset_version=18).graph
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds = [tuple(constants.get(name) for name in node.input) for node in graph.node if "Linear" in node.op_type]
    real, uint8, int8, int32 = (onnx.TensorProto.DataType.Value(k) for k in ("FLOAT", "UINT8", "INT8", "INT32"))
    assert sorted(kinds, key=str) == sorted(
        [(None, real, uint8), (None, real, uint8), (int8, real, int8), (int32, real, int32)], key=str
    )


@pytest.mark.parametrize(
    ("name", "clipped"), [("uint8", False), ("int8", False), ("int4", True), ("int8_narrow", True), ("int16", False)]
)
def test_codes_are_clipped_only_where_they_are_fewer_than_the_type_has(name, clipped, tmp_path):
    dtype, qmin, qmax, zero_point, opset = CODES[name]
    exported = export(RoundTrip(dtype, qmin, qmax, zero_point), tmp_path / "model.onnx", opset_version=opset)
    assert ("Clip" in [node.op_type for node in exported.graph.node]) == clipped


def test_only_the_onnx_exporter_counts_as_an_onnx_export(tmp_path):
    seen = []

    class Witness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(exporting_to_onnx())
            return x + 1

    Witness()(torch.ones(2))
    torch.export.export(Witness(), (torch.ones(2),))
    assert not any(seen)

    seen.clear()
    export(Witness(), tmp_path / "model.onnx")
    assert seen and all(seen)
    assert not exporting_to_onnx()


def test_the_old_exporter_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ExportError, match="dynamo=True"):
        export(RoundTrip(torch.uint8, 0, 255, 7), tmp_path / "model.onnx", dynamo=False)
