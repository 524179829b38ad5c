"""Weights that are no layer's own: computed in forward, or parameters that something else than a layer multiplies by.

They are rounded where they stand in the graph, as the weight of a layer is in it: signed, and per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_qat.errors import CalibrationError
from hf_qat.quantization.converted import ConvertedModule
from hf_qat.quantization.fake_quantize import dequantize, quantize
from hf_qat.quantization.folding import fold_fake_quantize
from hf_qat.quantization.layers import quantizers_in_graphs
from hf_qat.quantization.onnx_ops import dequantize_codes, exporting_to_onnx
from hf_qat.quantization.packing import code_dtype
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.weight_scale import weight_scale


class WeightObserver:
    """A `RangeCollector` that takes the scale from the weight itself, the same for all batches and on all ranks."""

    def __init__(self, spec: QuantizerSpec) -> None:
        self.spec = spec
        self._scale: Tensor | None = None

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the scale of the weight `x`, once."""
        if self._scale is None:
            if not bool(x.isfinite().all()):
                raise CalibrationError(f"a weight of shape {tuple(x.shape)} holds NaN or Inf")
            self._scale = weight_scale(x, self.spec)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale, () or (C,), and zero point 0."""
        if self._scale is None:
            raise CalibrationError("no weight was seen; run at least one batch through this part of the model")
        return self._scale, torch.zeros_like(self._scale)

    def synchronize(self) -> None:
        """The weight is the same on all ranks."""


class WeightQuantizer(FakeQuantize):
    """Rounds a weight of any shape, with one scale or one for each slice along `spec.axis`."""

    def start_observing(self) -> None:
        """Take the scale of the weight that passes, until `finish_observing`."""
        self.observer = WeightObserver(self.spec)

    def initialize_scale(self, weight: Tensor, spec: QuantizerSpec) -> None:
        """Set the scale by the way of `spec`; `weight` is that which will pass."""
        self.set_qparams(weight_scale(weight, spec))

    def codes(self, weight: Tensor) -> Tensor:
        """int32 codes of `weight`."""
        return quantize(weight, self.scale.detach(), None, self.spec.qmin, self.spec.qmax, self.spec.axis)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Fake-quantize the weight `x`; its gradient, and that of the scale, are those of a layer's weight."""
        if self.observer is not None or not self.rounds:
            return super().forward(x, activation)
        scale = self.scale.detach() if self.frozen else self.scale
        return fold_fake_quantize(x, None, scale, self.spec.qmin, self.spec.qmax, self.spec.axis or 0)


class QuantizedWeight(ConvertedModule):
    """The converted form: the integer codes themselves; what computed the weight is gone.

    Attributes:
        weight (buffer): int8 or int16, the codes.
        scale (buffer): () or (C,) float32.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, spec: QuantizerSpec, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight_spec = spec
        self.register_buffer("weight", codes.to(code_dtype(spec)))
        self.register_buffer("scale", scale.detach().clone())

    @property
    def codes(self) -> Tensor:
        """The integer codes of the weight."""
        return self.weight

    def forward(self) -> Tensor:
        """The weight in float32."""
        axis = self.weight_spec.axis
        if exporting_to_onnx():
            return dequantize_codes(self.weight, self.scale, axis)
        return dequantize(self.weight, self.scale, None, axis)


def activation_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The quantizers of a prepared model that round no weight, by path."""
    in_graphs = quantizers_in_graphs(model).items()
    return {path: quantizer for path, quantizer in in_graphs if not isinstance(quantizer, WeightQuantizer)}
