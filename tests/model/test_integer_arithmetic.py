"""The oracle is ONNX Runtime's own integer kernels, one at a time, on the codes that come into each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, compute_in_integers, convert, prepare_qat
from hf_qat.errors import StageError
from hf_qat.quantization.converted import QuantizedLayer
from hf_qat.quantization.layers import qat_layers
from tests.models import mobilenet_v2, resnet


def converted(model: nn.Module, x: Tensor, target: str = "int8") -> nn.Module:
    prepare_qat(model.eval(), QATConfig(target), x[:2])
    return convert(calibrate(model, [x[:8]]))


def codes_of(values: Tensor, quantizer: nn.Module) -> np.ndarray:
    """uint8 codes of dequantized values."""
    scale, zero = quantizer.scale.double().numpy(), int(quantizer.zero_point)
    codes = np.rint(values.double().numpy() / scale) + zero
    assert codes.min() >= 0 and codes.max() <= 255
    return codes.astype(np.uint8)


def kernel(layer: Any, source: Any, target: Any) -> onnxruntime.InferenceSession:
    """A model that is one QLinearConv, or one QGemm, with the layer's codes."""
    weight = {
        "a_scale": source.scale.numpy(),
        "a_zero": np.uint8(source.zero_point),
        "w": layer.codes.numpy(),
        "w_scale": layer.weight_scale.detach().numpy(),
        "w_zero": np.zeros(layer.weight_scale.shape, np.int8),
        "y_scale": target.scale.numpy(),
        "y_zero": np.uint8(target.zero_point),
        "bias": layer._buffers["bias"].numpy(),
    }
    if layer.codes.dim() == 2:
        names = ["x", "a_scale", "a_zero", "w", "w_scale", "w_zero", "bias", "y_scale", "y_zero"]
        node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=1)
    else:
        given = layer.operation_args
        stride, padding, dilation, groups = [*given, *([1, 1], [0, 0], [1, 1], 1)[len(given) :]]
        names = ["x", "a_scale", "a_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero", "bias"]
        sizes = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
        node = helper.make_node("QLinearConv", names, ["y"], **sizes)
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in ("x", "y")]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weight.items()]
    graph = helper.make_graph([node], "kernel", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def compare(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Layers compared, values compared, and values whose codes are not those of ONNX Runtime's kernel."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module._quantizers]
    between = {layer: layer._quantizers for layer in layers}
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    for layer, (_, target) in between.items():

        def compute(x: Tensor, arguments: Any = None, layer: Any = layer, original: Any = layer.compute) -> Tensor:
            inputs[layer] = x
            return original(x, arguments)

        layer.compute = compute  # captured graphs call it, and no hooks
        target.register_forward_hook(lambda target, args, out: outputs.update({target: out}))
    with torch.no_grad():
        model(x)
    values = different = 0
    for layer, (source, target) in between.items():
        (expected,) = kernel(layer, source, target).run(None, {"x": codes_of(inputs[layer], source)})
        found = codes_of(outputs[target], target)
        assert found.shape == expected.shape
        values, different = values + found.size, different + int((found != expected).sum())
    return len(layers), values, different


@pytest.mark.parametrize(
    ("make", "layers"),
    [(resnet, 7), pytest.param(mobilenet_v2, 53, marks=pytest.mark.slow)],
    ids=["resnet", "mobilenet_v2"],
)
def test_every_layer_has_the_codes_of_onnx_runtimes_integer_kernel(make, layers):
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = compute_in_integers(converted(make(), x))
    compared, values, different = compare(model, x)
    assert compared == layers and values > 200_000
    assert different <= 1e-5 * values


class Long(nn.Module):
    """Sums of 2048 products, which float32 does not hold exactly."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(2048, 1000)
        nn.init.normal_(self.linear.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_near_ties_that_float_rounds_the_other_way_come_out_as_the_kernel_has_them():
    x = torch.randn(400, 2048, generator=torch.Generator().manual_seed(1))
    model = converted(Long(), x)
    compute_in_integers(model)
    layers, values, different = compare(model, x)
    assert (layers, values, different) == (1, 400_000, 0)
    with torch.no_grad():
        exact = model(x)
        in_float = compute_in_integers(model, enabled=False)(x)
    ties = (exact != in_float).sum().item()
    step = model.linear.activation_quantizer.scale
    assert 0 < ties < 400
    assert (exact - in_float).abs().max().item() == pytest.approx(step.item(), rel=1e-3)


def test_a_layer_without_a_quantized_input_computes_as_before():
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(1))
    model = prepare_qat(Long().eval(), QATConfig(exclude=["linear"]), x)
    assert qat_layers(model) == {}
    model = convert(calibrate(model, [x]))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(compute_in_integers(model)(x), expected)


def test_a_model_that_is_not_converted_is_refused():
    model = prepare_qat(Long().eval(), QATConfig(), torch.zeros(2, 2048))
    with pytest.raises(StageError, match="not converted"):
        compute_in_integers(model)
