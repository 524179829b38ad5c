"""Brevitas: the layer-by-layer flow of its ImageNet example, as its FX flow cannot trace nets of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.benchmarks.peers.peer import Bits, Logits, Peer, edges, run_all


def quantize(model: Logits, batches: Sequence[Tensor], bits: Bits) -> nn.Module:
    """What `quantize_model` of the example does with `backend="layerwise"`, and its calibration.

    Its own rule for the layers that keep 8 bits knows the last one by its thousand classes.
    """
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.inject import value
    from brevitas_examples.imagenet_classification.ptq.ptq_common import create_quant_maps

    wide = [model.get_submodule(name) for name in edges(model)]
    scales = "po2_scale" if bits.power_of_two else "float_scale"
    _, layers, _, _ = create_quant_maps(
        dtype=torch.float32,
        device=next(model.parameters()).device,
        bias_bit_width=None,
        weight_bit_width=value(lambda module: bits.edge if module in wide else bits.weights),
        weight_param_method="stats",
        weight_scale_type=scales,
        weight_quant_type="sym",
        weight_quant_granularity="per_tensor" if bits.power_of_two else "per_channel",
        weight_narrow_range=False,
        weight_quant_format="int",
        act_quant_format="int",
        act_bit_width=value(lambda module: bits.edge if module in wide else bits.activations),
        act_scale_type=scales,
        act_scale_computation_type="static",
        act_param_method="stats",
        act_quant_type="sym" if bits.power_of_two else "asym",
        act_quant_granularity="per_tensor",
        act_quant_percentile=99.999,
    )
    made = layerwise_quantize(model, layers).eval()
    with torch.no_grad(), calibration_mode(made):
        run_all(made, batches)
    return made


def export(module: nn.Module, pixels: Tensor, file: Path) -> None:
    """Quantize, clip, dequantize."""
    from brevitas.export import export_onnx_qcdq

    export_onnx_qcdq(
        module,
        args=pixels,
        export_path=str(file),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )


def quantizers(module: nn.Module) -> tuple[int, int]:
    """Of weights, and of what goes into layers."""
    from brevitas.nn.mixin.parameter import QuantWeightMixin

    layers = [layer for layer in module.modules() if isinstance(layer, QuantWeightMixin)]
    weights = sum(layer.weight_quant.is_quant_enabled for layer in layers)
    return weights, sum(layer.input_quant.is_quant_enabled for layer in layers)


PEER = Peer(
    "Brevitas",
    "brevitas",
    "brevitas",
    ("int8", "TDA4VM", "w4a8", "w4a4"),
    "brevitas_examples.imagenet_classification.ptq, layerwise; all scales trained; batch norm stays a layer, live",
    quantize,
    export,
    quantizers,
)
