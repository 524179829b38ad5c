"""A layer that several parts of a model call, with inputs of different scales."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from hf_qat import calibrate, convert, export_onnx, fake_quant_disabled, prepare_qat
from hf_qat.quantization.converted import QuantizeDequantize
from tests.models import spread


class Half(nn.Module):
    """A layer of its own, and one that the other half has, too."""

    def __init__(self, shared: nn.Module, normalize: bool) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(8, 8), shared
        self.norm = nn.BatchNorm1d(8) if normalize else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.shared(torch.relu(self.own(x))))


class Halves(nn.Module):
    """Two children, captured one by one, that share a layer; a batch norm follows it in the first."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        shared = nn.Linear(8, 8)
        self.first, self.second = Half(shared, normalize), Half(shared, False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_layer_of_two_captured_children_is_one_layer_whose_bias_serves_both(normalize: bool, tmp_path: Path):
    model, x = spread(Halves(normalize)).eval(), torch.randn(16, 8)
    expected = model(x)
    prepare_qat(model, None, {"x": x})
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    convert(calibrate(model, [{"x": x}]))
    layer = model.first.shared
    assert layer is model.second.shared and layer.bias.dtype == torch.float32
    export_onnx(model, tmp_path / "model.onnx", {"x": x}, dynamic_batch=True)
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx", options).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, model(x).numpy(), atol=1.01 * float(_last_quantizer(model).scale))


def _last_quantizer(model: nn.Module) -> QuantizeDequantize:
    return [module for module in model.modules() if isinstance(module, QuantizeDequantize)][-1]
