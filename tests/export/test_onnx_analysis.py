"""A Q/DQ file against its float twin: figures against those of torch, and of values computed by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, analyze, analyze_onnx, calibrate, convert, export_onnx, prepare_qat
from hf_qat.errors import AnalysisError
from hf_qat.export.onnx_layers import quantized_layers, without_rounding
from tests.models import spread


class Net(nn.Module):
    """A convolution with batch norm, one that a residual goes around, pooling, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) → (N, 4)."""
        x = self.pool(torch.relu(self.norm(self.first(x))))
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


IMAGES = list(torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return spread(Net()).eval()


@pytest.fixture(scope="module")
def quantized(float_model: nn.Module) -> nn.Module:
    model = prepare_qat(copy.deepcopy(float_model), QATConfig("int8"), IMAGES[0])
    return convert(calibrate(model, IMAGES, bias_correction=False))


@pytest.fixture(scope="module")
def file(quantized: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(quantized, tmp_path_factory.mktemp("onnx") / "int8.onnx", IMAGES[0], dynamic_batch=True).path


@pytest.fixture(scope="module", params=[False, True], ids=["norm folded", "norm kept"])
def twin(request: pytest.FixtureRequest, float_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PyTorch exports it; its optimizer folds batch norms."""
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    torch.onnx.export(
        float_model, (IMAGES[0],), path, dynamo=True, optimize=not request.param, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert ("BatchNormalization" in kinds) == request.param
    return path


def decibels(exact: np.ndarray, other: np.ndarray) -> float:
    exact, other = exact.astype(np.float64), other.astype(np.float64)
    return 10 * math.log10((exact**2).sum() / ((exact - other) ** 2).sum())


@pytest.mark.filterwarnings("ignore")
def test_layers_have_the_figures_that_torch_gives(file, twin, quantized, float_model):
    found = {layer.path: layer for layer in analyze_onnx(file, IMAGES, twin).layers}
    expected = {layer.path: layer for layer in analyze(quantized, IMAGES, float_model).layers}
    assert list(found) == ["first", "second", "head"]
    for path, layer in found.items():
        assert layer.sqnr == pytest.approx(expected[path].sqnr, abs=0.2)
        assert layer.own_sqnr == pytest.approx(expected[path].own_sqnr, abs=0.2)
        assert (layer.weight_bits, layer.activation_bits) == (8, 8)
        assert (layer.lower, layer.upper) == pytest.approx((expected[path].lower, expected[path].upper))
        assert (layer.channels, layer.dead_channels) == (expected[path].channels, expected[path].dead_channels)


@pytest.mark.filterwarnings("ignore")
def test_sqnr_of_the_outputs_is_that_of_both_models_run_in_torch(file, twin, quantized, float_model):
    with torch.no_grad():
        exact, rounded = (np.concatenate([f(x).numpy() for x in IMAGES]) for f in (float_model, quantized))
    assert analyze_onnx(file, IMAGES, twin).output_sqnr == pytest.approx(decibels(exact, rounded), abs=0.2)


def test_without_a_reference_every_rounded_value_is_compared_with_its_own_float(file):
    found = analyze_onnx(file, IMAGES)
    assert [layer.path for layer in found.layers] == ["x", "first", "second", "add_0", "mean_0", "head"]
    assert [layer.operation for layer in found.layers][:4] == ["input", "Conv", "Conv", "Add"]
    assert all(20 < layer.sqnr < 80 for layer in found.layers)
    first = found.layers[0]  # the input is rounded once, so nothing else is in its noise
    assert first.sqnr == pytest.approx(first.own_sqnr)


def test_the_twin_without_rounding_computes_with_the_weights_of_the_codes(file, quantized, float_model, tmp_path):
    """By PyTorch, with the codes in the layers of the float model."""
    import onnxruntime

    onnx.save(without_rounding(onnx.load(file)), tmp_path / "twin.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "twin.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: IMAGES[0].numpy()})[0]
    coarse = copy.deepcopy(float_model)
    coarse.norm = nn.Identity()
    for name in ("first", "second", "head"):
        layer, integers = coarse.get_submodule(name), quantized.get_submodule(name)
        layer.weight, layer.bias = nn.Parameter(integers.weight), nn.Parameter(integers.float_bias())
    with torch.no_grad():
        assert np.abs(found - coarse(IMAGES[0]).numpy()).max() < 1e-4


def test_a_planted_fault_is_the_worst(file, tmp_path):
    model = onnx.load(file)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "second.weight"]
    (layer,) = [layer for layer in quantized_layers(model) if layer.path == "second"]
    (scale,) = [t for t in model.graph.initializer if t.name == "second.activation_quantizer.scale"]
    scale.CopyFrom(onnx.numpy_helper.from_array(np.array(layer.scale * 40, np.float32), scale.name))
    assert weight.dims
    onnx.save(model, tmp_path / "faulty.onnx")
    assert analyze_onnx(tmp_path / "faulty.onnx", IMAGES).worst(1)[0].path == "second"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("width", "words"), [(6, r"weight of \[3, 3, 3, 8\]"), (None, "has 1 layers with weights")])
def test_another_model_is_refused_by_name(width, words, file, tmp_path):
    other = spread(Net()).eval() if width else nn.Sequential(nn.Conv2d(3, 8, 3))
    if width:
        other.first, other.norm, other.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        other.head = nn.Linear(6, 4)
    torch.onnx.export(other, (IMAGES[0],), tmp_path / "other.onnx", dynamo=True, verbose=False)
    with pytest.raises(AnalysisError, match=words):
        analyze_onnx(file, IMAGES, tmp_path / "other.onnx")


@pytest.mark.filterwarnings("ignore")
def test_a_float_file_and_no_batches_are_refused(file, twin):
    with pytest.raises(AnalysisError, match="rounds nothing"):
        analyze_onnx(twin, IMAGES)
    with pytest.raises(AnalysisError, match="no batches"):
        analyze_onnx(file, [])
    with pytest.raises(AnalysisError, match="a batch holds 2 tensors"):
        analyze_onnx(file, [(IMAGES[0], IMAGES[0])])
