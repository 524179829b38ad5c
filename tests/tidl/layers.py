"""ONNX models of one layer, and models in ONNX's text format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hf_qat import check_tidl


def one_layer(
    operator: str,
    shape: list,
    *constants: np.ndarray | list | None,
    opset: int = 17,
    infer: bool = True,
    second: list | None = None,
    outputs: int = 1,
    kind: int = TensorProto.FLOAT,
    **attributes: object,
) -> onnx.ModelProto:
    """A model of one node: an input `x`, perhaps an input `y`, then constants; `None` leaves an optional one out."""
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    names, initializers = ["x"], []
    if second is not None:
        inputs.append(helper.make_tensor_value_info("y", kind, second))
        names.append("y")
    for position, constant in enumerate(constants):
        name = "" if constant is None else f"c{position}"
        names.append(name)
        if constant is not None:
            value = np.asarray(constant)
            value = value.astype(np.float32) if value.dtype == np.float64 else value
            initializers.append(numpy_helper.from_array(value, name))
    results = [f"out{position}" for position in range(outputs)]
    node = helper.make_node(operator, names, results, name="layer", **attributes)
    declared = [helper.make_empty_tensor_value_info(name) for name in results]
    graph = helper.make_graph([node], "g", inputs, declared, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, data_prop=True) if infer else model


def from_text(graph: str, opset: int = 17, imports: str = "") -> onnx.ModelProto:
    """A model in ONNX's text format, with shapes inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{imports}]> {graph}')
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


#: What any small float model is told, and a file of an opset that is newer than tools 11.0.
OF_ANY_FILE = {"no-quantizers", "opset"}


def findings(path: Path, device: str = "AM68A") -> dict[str, str]:
    """What `check_tidl` says of a file: rule → verdict and reason; without what it says of any small float model."""
    issues = check_tidl(path, device).issues
    return {issue.rule: f"{issue.verdict}: {issue.why}" for issue in issues if issue.rule not in OF_ANY_FILE}
