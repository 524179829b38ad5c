"""What TIDL can take over from the quantizers of a Q/DQ model.

Sources: edgeai-tidl-tools, docs/tidl_fsg_quantization.md (8 bit only; schemes by device) and docs/operators.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_qat.tidl.devices import QUANTIZATION_DOC, Device
from hf_qat.tidl.graph import DEQUANTIZE, QUANTIZE, Layer, Quantizer
from hf_qat.tidl.rules.registry import Finding, layer_rule


#: Code types of activations and weights, and of biases.
CODES, BIAS_CODES = frozenset({"int8", "uint8"}), frozenset({"int32"})

#: The axis of output channels of the weights of a layer that is not transposed; `Gemm` and `MatMul` see below.
OUTPUT_CHANNELS = {"Conv": 0, "ConvTranspose": 1}

#: The zero point of symmetric activations in TI's own files (edgeai-torchmodelopt, WC8SYMP2_AT8SYMP2).
TI_ZERO_POINT = 127

_8_BIT = f"{QUANTIZATION_DOC}, section A.2 (pre-quantized models: 8 bit only)"


def _refused(rule: str, why: str, remedy: str, source: str) -> Finding:
    return Finding(rule, why, remedy, source, "refused")


@layer_rule(QUANTIZE, DEQUANTIZE)
def code_type(layer: Layer, device: Device) -> Iterator[Finding]:
    """8 bits; 32 for a bias."""
    kind = layer.graph.quantizer(layer.node).dtype
    if kind is None:
        return
    fixed = layer.node.output[0] in layer.graph.fixed
    allowed = CODES | BIAS_CODES if fixed and layer.node.op_type == DEQUANTIZE else CODES
    if kind.name not in allowed:
        yield _refused(
            "qdq-type", f"its codes are {kind.name}", "quantize with int8 or uint8 (biases with int32)", _8_BIT
        )


@layer_rule(QUANTIZE, DEQUANTIZE)
def scale(layer: Layer, device: Device) -> Iterator[Finding]:
    """A constant above 0, of the kind that the device multiplies with."""
    quantizer = layer.graph.quantizer(layer.node)
    if quantizer.scale is None or quantizer.zero_point is None:
        yield _refused(
            "qdq-dynamic", "its scale is computed at run time", "quantize with constant scales", QUANTIZATION_DOC
        )
        return
    if not (np.isfinite(quantizer.scale).all() and (quantizer.scale > 0).all()):
        yield _refused("qdq-scale", "a scale is not above 0", "calibrate again", QUANTIZATION_DOC)
        return
    yield from _scheme(quantizer, device)
    yield from _channels(layer, quantizer, device)


def _scheme(quantizer: Quantizer, device: Device) -> Iterator[Finding]:
    assert quantizer.scale is not None and quantizer.zero_point is not None
    train = f"train with QATConfig(target={device.name!r})"
    if device.power_of_two.value and not _powers_of_two(quantizer.scale):
        yield _refused(
            "scheme-power-of-two",
            f"its scale {float(np.ravel(quantizer.scale)[0]):g} is no power of two",
            train,
            device.power_of_two.source,
        )
    if not device.asymmetric.value and _written_by_ti(quantizer):
        yield Finding(
            "scheme-middle-zero-point",
            f"its zero point is {TI_ZERO_POINT} of uint8, as TI's own training writes signed activations",
            "train with int8 and zero point 0, which says the same and is what TI's documents ask for",
            f"edgeai-torchmodelopt, quantization v2; {device.asymmetric.source}",
            "warning",
        )
    elif not device.asymmetric.value and quantizer.zero_point.any():
        yield _refused(
            "scheme-zero-point",
            f"its zero point is {int(np.ravel(quantizer.zero_point)[0])}",
            train,
            device.asymmetric.source,
        )


def _written_by_ti(quantizer: Quantizer) -> bool:
    """Whether this is how edgeai-torchmodelopt writes a signed activation: uint8 around 127."""
    zero = quantizer.zero_point
    return quantizer.dtype == np.uint8 and zero is not None and zero.size > 0 and bool((zero == TI_ZERO_POINT).all())


def _powers_of_two(scale: np.ndarray) -> bool:
    return bool((np.frexp(scale)[0] == 0.5).all())


def _channels(layer: Layer, quantizer: Quantizer, device: Device) -> Iterator[Finding]:
    if not quantizer.per_channel:
        return
    if layer.node.output[0] not in layer.graph.fixed:
        yield _refused(
            "scheme-activation-channels",
            "an activation has one scale per channel",
            "use one scale for each activation",
            QUANTIZATION_DOC,
        )
    elif not device.per_channel.value:
        yield _refused(
            "scheme-per-channel",
            "weights have one scale per channel",
            f"train with QATConfig(target={device.name!r})",
            device.per_channel.source,
        )
    else:
        yield from _weight_axis(layer, quantizer)


def _weight_axis(layer: Layer, quantizer: Quantizer) -> Iterator[Finding]:
    """Scales of weights run along output channels."""
    codes = layer.shape(0)
    for node in layer.graph.readers.get(layer.node.output[0], ()):
        reader = Layer(layer.graph, node)
        if len(node.input) < 2 or node.input[1] != layer.node.output[0] or codes is None:
            continue
        wanted = OUTPUT_CHANNELS.get(node.op_type)
        if node.op_type == "Gemm":
            wanted = 0 if reader.attribute("transB", 0) else 1
        elif node.op_type == "MatMul":
            wanted = len(codes) - 1
        if wanted is not None and quantizer.axis % len(codes) != wanted:
            yield _refused(
                "scheme-weight-axis",
                f"its scales run along axis {quantizer.axis} of {list(codes)}",
                f"let them run along output channels, axis {wanted}",
                QUANTIZATION_DOC,
            )


@layer_rule("Conv", "ConvTranspose", "Gemm", "MatMul")
def inputs_are_quantized(layer: Layer, device: Device) -> Iterator[Finding]:
    """In a Q/DQ model, everything that is multiplied comes from a quantizer."""
    if not layer.graph.quantizers:
        return
    for position in (0, 1):
        name = layer.node.input[position]
        if not layer.varies(position) and layer.graph.makers.get(name) is None:
            what = "its weights are float"
        elif layer.varies(position) and not _comes_from_quantizer(layer, name):
            what = "its input has no quantizer"
        else:
            continue
        yield Finding(
            "no-range",
            f"{what}, though the rest of the model is quantized: TIDL has no range for it, and does not calibrate",
            "quantize this layer too: do not exclude it in QATConfig",
            QUANTIZATION_DOC,
            "warning",
        )


def _comes_from_quantizer(layer: Layer, name: str) -> bool:
    """Whether numbers go from a quantizer to here without being multiplied or added on the way."""
    graph, keeping = layer.graph, {"Relu", "Clip", "MaxPool", "Concat", "Expand", "Pad", "Resize", "DepthToSpace"}
    while graph.before(name) is None:
        maker = graph.makers.get(name)
        if maker is None or maker.op_type not in keeping:
            return False
        name = maker.input[0]
    return True


@layer_rule("Clip")
def code_range(layer: Layer, device: Device) -> Iterator[Finding]:
    """All codes of 8 bits: `Clip` between the halves of a pair makes them fewer."""
    maker = layer.graph.makers.get(layer.node.input[0])
    if maker is None or maker.op_type != QUANTIZE:
        return
    low, high = layer.constant(1), layer.constant(2)
    limits = "constants" if low is None or high is None else f"{int(low)} to {int(high)}"
    yield _refused(
        "qdq-bits",
        f"its codes are clipped to {limits}: activations of fewer than 8 bits",
        "train with activations of 8 bits",
        _8_BIT,
    )


@layer_rule("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
def integer_operators(layer: Layer, device: Device) -> Iterator[Finding]:
    """TIDL reads Q/DQ, not the operators that compute on codes."""
    yield Finding(
        "integer-operator",
        "TIDL does not read operators on integer codes",
        "export with QuantizeLinear and DequantizeLinear around float operators",
        QUANTIZATION_DOC,
    )
