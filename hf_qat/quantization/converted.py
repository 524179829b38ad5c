"""Converted modules: integer codes, scales and zero points as buffers, for inference and for export to ONNX.

In eager mode they compute what ONNX Runtime computes with its optimizations off: dequantized weights and bias, a
float operation, quantize-dequantize of its result; or, on request, what its integer kernels compute. While
`torch.onnx.export` traces, they emit the ONNX operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.errors import StageError
from hf_qat.quantization.bias import bias_scale, quantize_bias
from hf_qat.quantization.class_swap import swap_class
from hf_qat.quantization.fake_quantize import along, dequantize, fake_quantize
from hf_qat.quantization.layers import CORRECTED, QATLayer
from hf_qat.quantization.onnx_ops import dequantize_codes, exporting_to_onnx, quantize_dequantize
from hf_qat.quantization.packing import code_dtype
from hf_qat.quantization.quantizer import ACTIVATIONS, FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec


class ConvertedModule(nn.Module):
    """Refuses casts: of codes, and of scales that are rounded to another type, a model computes something else."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedModule:
        """What `to`, `half`, `cuda`, … pass their change of a tensor to."""
        dtype = fn(torch.empty(1, dtype=torch.float32)).dtype
        if dtype != torch.float32:
            raise StageError(
                f"cannot cast a converted model to {dtype}: its scales and biases are float32, as they are in the "
                "exported file. Leave it as it is; torch.autocast computes its layers in half precision. If modules "
                "beside the quantized ones have been cast before this error, load the model anew, or call .float()."
            )
        super()._apply(fn, recurse)
        return self


class QuantizeDequantize(ConvertedModule):
    """The converted quantizer.

    Attributes:
        scale (buffer): () float32.
        zero_point (buffer): (), the dtype of the codes.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantizerSpec, scale: Tensor, zero_point: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", scale.detach().clone())
        zero = torch.zeros_like(scale) if zero_point is None else zero_point.detach().round()
        self.register_buffer("zero_point", zero.to(code_dtype(spec)))

    @classmethod
    def of(cls, quantizer: FakeQuantize) -> QuantizeDequantize:
        """The converted form of a trained quantizer."""
        return cls(quantizer.spec, quantizer.scale, quantizer.zero_point)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Round `x`, after `activation`, to what the codes can represent."""
        if activation is not None:
            x = ACTIVATIONS[activation](x)
        qmin, qmax = self.spec.qmin, self.spec.qmax
        if not exporting_to_onnx():
            return fake_quantize(x, self.scale, self.zero_point.to(torch.float32), qmin, qmax)
        if self.spec.non_negative:
            qmin = torch.iinfo(code_dtype(self.spec)).min  # nothing negative comes in: no clip needed
        return quantize_dequantize(x, self.scale, self.zero_point, qmin, qmax)

    def extra_repr(self) -> str:
        """Width, scale and zero point."""
        kind = f"{'int' if self.spec.signed else 'uint'}{self.spec.bits}"
        if self.scale.is_meta:
            return kind
        return f"{kind}, scale={float(self.scale):.6g}, zero_point={int(self.zero_point)}"


class QuantizedLayer(ConvertedModule):
    """Mixed into the class of a converted convolution or linear layer.

    Attributes:
        codes: int8 or int16, of `weight_shape`; under the name `weight` in the state dict. While `from_pretrained`
            reads a checkpoint they have the shape under which they are stored.
        weight_scale (parameter without gradient): () or (C,) float32.
        bias (buffer): (C,) int32, or `None`; `bias_scale` (buffer): (C,) float32, scale of the input times
            `weight_scale`. Without a quantized input the bias is float32 and has no scale.
        folded_norm: path, in the model, of the batch norm that was folded in; `None` if there was none.
    """

    weight_scale: Tensor
    bias_scale: Tensor | None
    weight_spec: QuantizerSpec
    weight_shape: torch.Size
    channel_axis: int
    folded_norm: str | None
    operation: Callable[..., Tensor]
    operation_args: tuple[Any, ...]
    # In a tuple, so that they are not registered a second time, under a second name.
    _quantizers: tuple[QuantizeDequantize, QuantizeDequantize] | None

    def set_quantizers(self, quantizers: tuple[QuantizeDequantize, QuantizeDequantize] | None) -> None:
        """Compute in integers, between codes of the one and of the other of `quantizers`; `None`: in float."""
        self._quantizers = quantizers if self.bias_scale is not None or self._buffers["bias"] is None else None

    @property
    def codes(self) -> Tensor:
        """The integer codes of the weight."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def weight(self) -> Tensor:
        """The weight in float32, dequantized: outer code reads its dtype and its shape, and may fill it with noise."""
        if self.codes.shape != self.weight_shape:
            return torch.empty(self.weight_shape, dtype=torch.float32, device="meta")
        return dequantize(self.codes, self.weight_scale, None, self._axis(self.weight_scale))

    def forward(self, x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
        """See `compute`."""
        return self.compute(x, arguments)

    def compute(self, x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
        """(N, C_in, …) → (N, C_out, …); `arguments` in place of `operation_args`."""
        arguments = self.operation_args if arguments is None else arguments
        if not exporting_to_onnx():
            if self._quantizers is not None:
                return self._integer_output(x, arguments, *self._quantizers)
            return self.operation(x, self.weight, self.float_bias(), *arguments)
        weight = dequantize_codes(self.codes, self.weight_scale, self._axis(self.weight_scale))
        bias = self._buffers["bias"]
        if bias is not None and self.bias_scale is not None:
            bias = dequantize_codes(bias, self.bias_scale, 0 if self.bias_scale.dim() else None)
        return self.operation(x, weight, bias, *arguments)

    def _integer_output(
        self, x: Tensor, arguments: tuple[Any, ...], source: QuantizeDequantize, target: QuantizeDequantize
    ) -> Tensor:
        """The output rounded to steps of `target`, which are still to be clamped.

        Sums of products of codes are whole numbers, below 2**53 and so exact in float64. The factor comes about in
        float32 and in ONNX Runtime's order (`QLinearConv`).
        """
        codes, bias = torch.round(x.double() / source.scale.double()), self._buffers["bias"]
        total = self.operation(codes, self.codes.double(), None if bias is None else bias.double(), *arguments)
        factor = source.scale * self.weight_scale / target.scale
        return (total.float() * along(factor, total, self.channel_dim(total))).round_().mul_(target.scale)

    def channel_dim(self, output: Tensor) -> int:
        """Axis of the channels in the output: 1 of a convolution's (0 unbatched), the last of a linear layer's."""
        return output.dim() - 1 if self.codes.dim() == 2 else output.dim() - self.codes.dim() + 1

    def float_bias(self) -> Tensor | None:
        """(C,) float32, dequantized."""
        bias = self._buffers["bias"]
        return bias if bias is None or self.bias_scale is None else bias.to(torch.float32) * self.bias_scale

    def _axis(self, scale: Tensor) -> int | None:
        return self.channel_axis if scale.dim() else None


@torch.no_grad()
def convert_layer(layer: QATLayer) -> QuantizedLayer:
    """Exchange float weight, quantizer and batch norm for integer codes, in place.

    Args:
        layer: trained; its batch norm is folded in (and is no longer referred to). Without an input quantizer the bias
            stays float.
    """
    quantizer, source = layer.weight_quantizer, layer.quantizer_of_input
    input_scale = None if source is None else source.scale.detach()
    bias, scale = layer.float_bias(), layer.device_scale().detach().clone()
    codes, spec = layer.codes(scale), quantizer.spec
    for name in ("weight", "bias"):
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
    del layer._modules["weight_quantizer"]
    for name in ("_batch_norm", "_input_quantizer", "batch_norm_frozen"):
        del layer.__dict__[name]
    layer.__dict__.pop(CORRECTED, None)
    forward = type(layer).__dict__.get("forward")
    layer.restore_class()
    converted = swap_class(layer, QuantizedLayer, forward)
    converted.weight_spec = spec
    converted.folded_norm = None
    converted._quantizers = None
    converted._buffers["weight"] = codes.to(code_dtype(spec))
    converted.weight_shape = codes.shape
    # A parameter, because a Hugging Face model reads its own dtype and device off the first one that it has.
    converted.weight_scale = nn.Parameter(scale, requires_grad=False)
    _set_bias(converted, bias, None if input_scale is None else bias_scale(input_scale, scale))
    return converted


def _set_bias(layer: QuantizedLayer, bias: Tensor | None, scale: Tensor | None) -> None:
    if bias is None:
        scale = None
    elif scale is not None:
        bias = quantize_bias(bias, scale)
    layer._buffers["bias"] = None if bias is None else bias.detach().clone()
    layer.register_buffer("bias_scale", scale)
