"""Small ONNX models, and ONNX Runtime without its optimizations: the judge of what a file computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.export import ExportReport
from tests.models import HUGGING_FACE


Run = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def run_onnx() -> Run:
    """`run(model, x, …)`: the outputs of an ONNX model for its inputs, in order."""

    def run(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        names = [value.name for value in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return run


@pytest.fixture(scope="session")
def parse() -> Callable[..., onnx.ModelProto]:
    """`parse(text, opset)`: a model from ONNX's own text format; outputs written without a shape have none."""

    def parse_text(graph: str, opset: int = 18, functions: str = "", imports: str = "") -> onnx.ModelProto:
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{imports}]> {graph} {functions}')
        for output in model.graph.output:
            if not output.type.tensor_type.shape.dim:
                output.type.tensor_type.ClearField("shape")
        return model

    return parse_text


def export_stock(
    model: nn.Module, x: torch.Tensor, path: Path, opset: int = 18, dynamic: bool = False
) -> onnx.ModelProto:
    """What PyTorch's own exporter writes."""
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (x,), path, opset_version=opset, dynamic_shapes=shapes, verbose=False)
    return onnx.load(path)


@pytest.fixture(scope="session")
def stock_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., onnx.ModelProto]:
    """`export(model, x, opset, dynamic)` with PyTorch's own exporter."""

    def export(model: nn.Module, x: torch.Tensor, opset: int = 18, dynamic: bool = False) -> onnx.ModelProto:
        return export_stock(model, x, tmp_path_factory.mktemp("stock") / "model.onnx", opset, dynamic)

    return export


#: Float nets that clean-up is tried on, and those that take long.
CLEANED = [
    "resnet",
    "convnext",
    "swin",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("mobilenet_v2", "segformer")),
]


@pytest.fixture(scope="session", params=CLEANED)
def hugging_face_export(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnx.ModelProto, np.ndarray]:
    """A tiny Hugging Face model in float, at opset 18, with a dynamic batch; and pixels for it."""
    case = HUGGING_FACE[request.param]
    model = case.make()
    model.set_attn_implementation("eager")
    path = tmp_path_factory.mktemp("hugging_face") / "model.onnx"
    return export_stock(model, case.pixels(2), path, dynamic=True), case.pixels(3, seed=1).numpy()


@pytest.fixture(scope="session")
def converted() -> Callable[..., nn.Module]:
    """`converted(name, target)`: a model of `tests.models`, calibrated and converted; made once, not to be changed."""

    @cache
    def make(name: str, target: str = "int8", **changes: object) -> nn.Module:
        case = HUGGING_FACE[name]
        batch = {"pixel_values": case.pixels(8)}
        model = prepare_qat(case.make(), QATConfig(target, **changes), batch)
        return convert(calibrate(model, [batch]))

    return make


@pytest.fixture(scope="session")
def exported(
    converted: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[nn.Module, ExportReport]]:
    """`exported(name)`: that model and the report on its file, with a static batch at opset 17; made once."""

    @cache
    def make(name: str) -> tuple[nn.Module, ExportReport]:
        model = converted(name)
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        return model, export_onnx(model, path, {"pixel_values": HUGGING_FACE[name].pixels(8, seed=1)})

    return make
