"""Pools of any attributes between Q/DQ pairs: ONNX Runtime, plain and optimized, against PyTorch's own pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.export.pooling import spell_out_windows


SCALE, ZERO_POINT = np.float32(0.0625), np.uint8(100)

AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
LARGEST = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


@st.composite
def pools(draw: Any) -> tuple[str, list[int], dict[str, Any]]:
    """An operator, the size of the map, and torch's arguments."""
    axes = draw(st.integers(1, 3))
    operator = draw(st.sampled_from(["AveragePool", "MaxPool"]))
    sizes = [draw(st.integers(3, 9)) for _ in range(axes)]
    kernel = [draw(st.integers(1, size + 2)) for size in sizes]
    arguments: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": [draw(st.integers(1, 4)) for _ in range(axes)],
        "padding": [draw(st.integers(0, k // 2)) for k in kernel],
        "ceil_mode": True,
    }
    if operator == "MaxPool":
        arguments["dilation"] = [draw(st.integers(1, 2)) for _ in range(axes)]
    else:
        arguments["count_include_pad"] = draw(st.booleans())
    return operator, sizes, arguments


def pool(operator: str, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    function = (AVERAGE if operator == "AveragePool" else LARGEST)[x.dim() - 2]
    return function(x, **arguments)


def model_of(operator: str, size: list[int], out: list[int], arguments: dict[str, Any]) -> onnx.ModelProto:
    """Q/DQ, the pool as PyTorch's exporter writes it, Q/DQ; the shape after the pool is PyTorch's."""
    attributes = {
        "kernel_shape": arguments["kernel_size"],
        "strides": arguments["stride"],
        "pads": arguments["padding"] * 2,
        "ceil_mode": 1,
    }
    if operator == "MaxPool":
        attributes["dilations"] = arguments["dilation"]
    else:
        attributes["count_include_pad"] = int(arguments["count_include_pad"])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "o"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["d"]),
        helper.make_node(operator, ["d"], ["p"], **attributes),
        helper.make_node("QuantizeLinear", ["p", "s", "o"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "o"], ["z"]),
    ]
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 3, *size]), ("d", [2, 3, *size]), ("p", [2, 3, *out]), ("z", [2, 3, *out]))
    }
    constants = [numpy_helper.from_array(np.asarray(SCALE), "s"), numpy_helper.from_array(np.asarray(ZERO_POINT), "o")]
    graph = helper.make_graph(
        nodes, "g", [values["x"]], [values["z"]], constants, value_info=[values["d"], values["p"]]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray, optimized: bool) -> np.ndarray:
    levels, options = onnxruntime.GraphOptimizationLevel, onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(max_examples=150)
@given(pools())
def test_both_settings_of_onnx_runtime_compute_what_torch_does(drawn):
    operator, size, arguments = drawn
    codes = np.random.default_rng(0).integers(0, 256, (2, 3, *size))
    x = ((codes - ZERO_POINT.astype(int)) * SCALE).astype(np.float32)
    try:
        wanted = pool(operator, torch.from_numpy(x), arguments).numpy()
    except RuntimeError:  # no window fits, or padding is wider than torch takes
        assume(False)
    model = model_of(operator, size, list(wanted.shape[2:]), arguments)

    spell_out_windows(model)

    onnx.checker.check_model(model, full_check=True)
    assert not any(attribute.name == "ceil_mode" for node in model.graph.node for attribute in node.attribute)
    for optimized in (False, True):
        result = run(model, x, optimized)
        assert result.shape == wanted.shape
        assert np.abs(result - np.clip(wanted, -100 * SCALE, 155 * SCALE)).max() <= 0.501 * SCALE


def test_without_it_onnx_runtime_divides_by_what_lies_outside():
    x = np.full((2, 3, 6), 80 * SCALE, np.float32)
    arguments = {"kernel_size": [3], "stride": [2], "padding": [1], "ceil_mode": True, "count_include_pad": True}
    wanted = pool("AveragePool", torch.from_numpy(x), arguments).numpy()
    model = model_of("AveragePool", [6], list(wanted.shape[2:]), arguments)
    assert np.abs(run(model, x, optimized=True) - wanted).max() > SCALE
    spell_out_windows(model)
    assert [node.op_type for node in model.graph.node][2:4] == ["Pad", "AveragePool"]
    assert np.abs(run(model, x, optimized=True) - wanted).max() <= 0.501 * SCALE


@pytest.mark.parametrize("batch", ["one", "any"])
@pytest.mark.parametrize(
    ("layer", "module"),
    [
        pytest.param(nn.Conv2d, nn.AvgPool2d(2, (4, 2), padding=1, ceil_mode=True), id="average"),
        pytest.param(nn.Conv1d, nn.MaxPool1d(4, 4, padding=1, ceil_mode=True), id="largest"),
    ],
)
def test_a_window_that_torch_leaves_out_is_left_out_of_the_file(layer, module, batch, tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 7) if layer is nn.Conv2d else torch.randn(2, 3, 7)
    model = nn.Sequential(layer(3, 4, 1), module, layer(4, 3, 1))
    convert(calibrate(prepare_qat(model, QATConfig(), x), [x]).eval())
    assert export_onnx(model, tmp_path / "model.onnx", x, dynamic_batch=batch == "any").max_output_lsb <= 1
