"""How many multiplications with accumulation a layer does, from its shapes."""

from __future__ import annotations

from math import prod

from hf_qat.tidl.graph import Layer


def macs(layer: Layer) -> int:
    """Of convolutions and matrix products; 0 for all others, and where a shape is unknown."""
    shapes = [layer.shape(0), layer.shape(1), layer.output_shape]
    if any(shape is None or None in shape for shape in shapes):
        return 0
    x, weights, output = ([size or 0 for size in shape or ()] for shape in shapes)
    if layer.operator == "Conv":  # weights: (output channels, input channels of a group, *kernel)
        return prod(output) * prod(weights[1:])
    if layer.operator == "ConvTranspose":  # weights: (input channels, output channels of a group, *kernel)
        return prod(x) * prod(weights[1:])
    if layer.operator == "Gemm":
        return prod(output) * (x[0] if layer.attribute("transA", 0) else x[-1])
    return prod(output) * x[-1] if layer.operator == "MatMul" else 0
