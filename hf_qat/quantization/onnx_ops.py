"""The ONNX operators `QuantizeLinear` and `DequantizeLinear` as nodes of a trace that is on its way to ONNX.

Nothing is computed here: the results have the right shape and dtype and hold zeros. Both stock exporters reject
per-channel fake quantization with codes −127…127, so converted modules emit the ONNX operators themselves. Each
quantizer, weight and bias is one operator of PyTorch's while a model is traced, because tracing costs time for each:
`hf_qat.export_onnx` translates it, and a plain `torch.onnx.export` decomposes it into ONNX's operators.
Specification: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._guards import TracingContext

from hf_qat.errors import ExportError


_LIBRARY = torch.library.Library("hf_qat", "FRAGMENT")
_LIBRARY.define("quantize_dequantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax) -> Tensor")
_LIBRARY.define("dequantize_codes(Tensor codes, Tensor scale, int? axis) -> Tensor")


def exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` traces in this thread; `False` in a plain `torch.export.export` and in eager mode.

    PyTorch says for the process alone that it exports; another thread may compute meanwhile.
    """
    if not torch.onnx.is_in_onnx_export():
        return False
    return torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or TracingContext.try_get() is not None


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The pair: `dequantize_linear` of what `quantize_linear` returns for codes of the dtype of `zero_point`."""
    _refuse_old_exporter("QuantizeLinear")
    pair: Tensor = torch.ops.hf_qat.quantize_dequantize.default(x, scale, zero_point, qmin, qmax)
    return pair


def dequantize_codes(codes: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """`dequantize_linear` with a zero point of 0."""
    _refuse_old_exporter("DequantizeLinear")
    values: Tensor = torch.ops.hf_qat.dequantize_codes.default(codes, scale, axis)
    return values


@torch.library.register_fake("hf_qat::quantize_dequantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("hf_qat::dequantize_codes", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@register_decomposition(torch.ops.hf_qat.quantize_dequantize.default)
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    codes = quantize_linear(x, scale, zero_point, zero_point.dtype, qmin, qmax)
    return dequantize_linear(codes, scale, zero_point)


@register_decomposition(torch.ops.hf_qat.dequantize_codes.default)
def _(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return dequantize_linear(codes, scale, None, axis)


def quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, qmin: int, qmax: int
) -> Tensor:
    """`QuantizeLinear` with one scale, and a `Clip` where the codes do not use the whole of `dtype`.

    The clip makes codes of fewer than 8 bits ("QCDQ"). It stands in the way of a runtime's integer kernels, so give
    the limits of `dtype` where values outside `qmin`…`qmax` cannot occur, for example after a ReLU.

    Args:
        x: any shape, float32.
        scale: (), float32.
        zero_point: (), `dtype`; `None` for 0.
        dtype: of the codes: int8 or uint8; int16 or uint16, which ONNX has from opset 21 on.
        qmin, qmax: lowest and highest code.

    Returns:
        The codes: the shape of `x`, `dtype`.

    Raises:
        ExportError: the TorchScript-based exporter is tracing.
    """
    zero = _zero(scale, dtype) if zero_point is None else zero_point
    codes = _emit("QuantizeLinear", (x, scale, zero), like=x, dtype=dtype)
    limits = torch.iinfo(dtype)
    if qmin <= limits.min and qmax >= limits.max:
        return codes
    bounds = (torch.full((), bound, dtype=dtype) for bound in (max(qmin, limits.min), min(qmax, limits.max)))
    return _emit("Clip", (codes, *bounds), like=x, dtype=dtype)


def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None = None) -> Tensor:
    """`DequantizeLinear`.

    Args:
        codes: any shape; int8, uint8, int16, uint16, or int32 for a bias.
        scale: () or, with `axis`, (C,); float32.
        zero_point: the shape of `scale`, the dtype of `codes`; `None` for 0.
        axis: the axis of `codes` that `scale` runs along.

    Returns:
        float32, the shape of `codes`.

    Raises:
        ExportError: the TorchScript-based exporter is tracing.
    """
    zero = _zero(scale, codes.dtype) if zero_point is None else zero_point
    return _emit("DequantizeLinear", (codes, scale, zero), like=codes, dtype=torch.float32, axis=axis)


def _zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A zero point of 0. Never left out: without it `QuantizeLinear` means uint8."""
    return torch.zeros(scale.shape, dtype=dtype, device=scale.device)


def _emit(
    operator: str,
    inputs: tuple[Tensor, ...],
    *,
    like: Tensor,
    dtype: torch.dtype,
    axis: int | None = None,
) -> Tensor:
    """One node of the default ONNX domain, at the opset that the export asks for."""
    _refuse_old_exporter(operator)
    attributes = {} if axis is None else {"axis": axis}
    out = torch.onnx.ops.symbolic(operator, inputs, {**attributes}, dtype=dtype, shape=like.shape)
    # While tracing, the result is said to be on the CPU, wherever the inputs are. The copy leaves no node in the file.
    return out if out.device == like.device else out.to(like.device)


def _refuse_old_exporter(operator: str) -> None:
    if torch.jit.is_tracing():
        raise ExportError(
            f"{operator} cannot be written by the TorchScript-based exporter: call torch.onnx.export with "
            "dynamo=True, which is its default, or hf_qat.export_onnx."
        )
