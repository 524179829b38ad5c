"""Quantizers, weights and biases of converted models as `QuantizeLinear` and `DequantizeLinear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_qat.quantization import onnx_ops as onnx_ops  # defines the operators


def pairs() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` of the operators of `hf_qat.quantization.onnx_ops`."""
    from onnxscript import FLOAT, INT8, UINT8  # an optional dependency
    from onnxscript import opset18 as op

    def quantize_dequantize(x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> Any:
        codes, dtype = op.QuantizeLinear(x, scale, zero_point), zero_point.dtype.numpy()
        limits = np.iinfo(dtype)
        if qmin > limits.min or qmax < limits.max:
            bounds = (max(qmin, limits.min), min(qmax, limits.max))
            codes = op.Clip(codes, *(_constant(op, np.array(bound, dtype)) for bound in bounds))
        return op.DequantizeLinear(codes, scale, zero_point)

    def dequantize_codes(codes: Any, scale: Any, axis: Any = None) -> Any:
        zero_point = _constant(op, np.zeros(tuple(scale.shape), codes.dtype.numpy()))
        return op.DequantizeLinear(codes, scale, zero_point, **({} if axis is None else {"axis": axis}))

    # The exporter reads the types of what it translates.
    quantize_dequantize.__annotations__ = {
        "x": FLOAT,
        "scale": FLOAT,
        "zero_point": UINT8,
        "qmin": int,
        "qmax": int,
        "return": FLOAT,
    }
    dequantize_codes.__annotations__ = {"codes": INT8, "scale": FLOAT, "axis": int, "return": FLOAT}
    return {
        torch.ops.hf_qat.quantize_dequantize.default: quantize_dequantize,
        torch.ops.hf_qat.dequantize_codes.default: dequantize_codes,
    }


def _constant(op: Any, value: np.ndarray) -> Any:
    import onnx_ir

    return op.Constant(value=onnx_ir.tensor(value))
