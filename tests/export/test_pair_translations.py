"""The operators of converted modules, as ONNX Runtime computes them, against the formula."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat.export.pair_translations import pairs
from hf_qat.quantization.onnx_ops import dequantize_codes, quantize_dequantize


class Layer(nn.Module):
    """A quantizer, and a linear layer of int8 codes and an int32 bias."""

    def __init__(self, dtype: torch.dtype, zero_point: int, qmin: int, qmax: int) -> None:
        super().__init__()
        self.qmin, self.qmax = qmin, qmax
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=dtype))
        self.register_buffer("codes", torch.tensor([[-127, 5], [3, 127]], dtype=torch.int8))
        self.register_buffer("steps", torch.tensor([0.5, 0.125]))
        self.register_buffer("bias", torch.tensor([70_000, -3], dtype=torch.int32))
        self.register_buffer("bias_step", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = quantize_dequantize(x, self.scale, self.zero_point, self.qmin, self.qmax)
        weight = dequantize_codes(self.codes, self.steps, 0)
        return nn.functional.linear(x, weight, dequantize_codes(self.bias, self.bias_step))


CODES = {
    "uint8": (torch.uint8, 7, 0, 255, 18),
    "int8": (torch.int8, 0, -128, 127, 18),
    "int4": (torch.int8, 0, -8, 7, 18),
    "uint3": (torch.uint8, 2, 0, 7, 18),
    "int16": (torch.int16, 0, -(2**15), 2**15 - 1, 21),
    "uint16": (torch.uint16, 1000, 0, 2**16 - 1, 21),
}


@pytest.mark.parametrize("translated", [True, False], ids=["translated", "decomposed"])
@pytest.mark.parametrize(("dtype", "zero_point", "qmin", "qmax", "opset"), CODES.values(), ids=CODES.keys())
def test_both_ways_to_onnx_compute_the_formula(dtype, zero_point, qmin, qmax, opset, translated, run_onnx):
    x = np.array([[0.125, 0.375], [-1e6, 1e6], [0.9, -0.4]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Layer(dtype, zero_point, qmin, qmax),
            (torch.from_numpy(x),),
            opset_version=opset,
            custom_translation_table=pairs() if translated else None,
            verbose=False,
        )
    assert program is not None
    operators = [node.op_type for node in program.model_proto.graph.node]
    limits = torch.iinfo(dtype)
    assert operators.count("QuantizeLinear") == 1 and operators.count("DequantizeLinear") == 3
    assert operators.count("Clip") == (qmin > limits.min or qmax < limits.max)

    real = (np.clip(np.rint(x / np.float32(0.25)) + zero_point, qmin, qmax) - zero_point) * 0.25
    weight = np.array([[-127, 5], [3, 127]]) * np.array([[0.5], [0.125]])
    wanted = real @ weight.T + np.array([70_000, -3]) * 0.5
    np.testing.assert_allclose(run_onnx(program.model_proto, x)[0], wanted, rtol=1e-6, atol=1e-4)
