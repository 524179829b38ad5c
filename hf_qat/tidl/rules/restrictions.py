"""Deviations from TI's table of what each layer takes of a Q/DQ model: warnings, since TIDL may run them all the same.

"Even though a layer can support asymmetric activations, it may not be using the zero point, depending on its consumer"
(docs/quantization.md): what is computed then is not what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from hf_qat.tidl.devices import Device
from hf_qat.tidl.graph import MOVING, QUANTIZE, Graph, Layer, Quantizer
from hf_qat.tidl.layer_table import BEFORE_BATCH_NORM, BEFORE_RELU, LAYER_TABLE, LAYER_TABLE_DOC
from hf_qat.tidl.patterns import inside, places
from hf_qat.tidl.rules.registry import Finding, graph_rule, layer_rule


def _warning(rule: str, why: str, remedy: str) -> Finding:
    return Finding(rule, why, remedy, LAYER_TABLE_DOC, "warning")


def _offset(quantizer: Quantizer | None) -> int:
    """The zero point of an activation's quantizer; 0 where there is none."""
    if quantizer is None or quantizer.zero_point is None or not quantizer.zero_point.size:
        return 0
    return int(quantizer.zero_point.ravel()[0])


@graph_rule
def network_input(graph: Graph, device: Device) -> Iterator[Finding]:
    """The layer that takes in the image knows no zero point."""
    for value in graph.inputs if device.asymmetric.value else ():
        zero = _offset(graph.after(value.name))
        if zero:
            yield _warning(
                "asymmetric-input",
                f"the quantizer of input {value.name} has the zero point {zero}",
                "quantize the input without a zero point; TI's own training keeps one",
            )


@layer_rule(*LAYER_TABLE)
def symmetric(layer: Layer, device: Device) -> Iterator[Finding]:
    """Layers that take activations without a zero point only."""
    place = places(layer.graph).get(layer.node.output[0])
    if not device.asymmetric.value or (place is not None and place.pattern == "LayerNorm"):
        return  # a device without zero points refuses them anyway; a layer norm takes them
    remedy = "quantize it without a zero point"
    if layer.operator == "MatMul" and len(layer.variables) > 1:
        for what in _asymmetric(layer):
            yield _warning("asymmetric-product", f"it multiplies two activations, and {what}", remedy)
    elif not LAYER_TABLE[layer.operator].asymmetric:
        for what in _asymmetric(layer):
            yield _warning("asymmetric-layer", f"it takes no zero point, and {what}", remedy)


def _asymmetric(layer: Layer) -> Iterator[str]:
    """Which of its activations have a zero point."""
    sides = (
        ("an input", layer.variables, layer.graph.before),
        ("its output", [name for name in layer.node.output if name], layer.graph.after),
    )
    for side, names, find in sides:
        zeros = [zero for name in names if (zero := _offset(find(name)))]
        if zeros:
            yield f"{side} has the zero point {zeros[0]}"


@layer_rule(*(operator for operator, row in LAYER_TABLE.items() if row.per_tensor))
def per_tensor_weights(layer: Layer, device: Device) -> Iterator[Finding]:
    """Weights with one scale."""
    for name in layer.inputs:
        maker = layer.graph.makers.get(name)
        fixed = maker is not None and name in layer.graph.fixed and layer.graph.is_quantizer(maker)
        if maker is not None and fixed and layer.graph.quantizer(maker).per_channel:
            yield _warning(
                "per-channel-weights",
                "its weights have one scale per channel",
                "quantize them with one scale",
            )


@layer_rule(*(operator for operator, row in LAYER_TABLE.items() if row.pair))
def pair(layer: Layer, device: Device) -> Iterator[Finding]:
    """A Q/DQ pair of its own after it."""
    if layer.graph.quantizers and not inside(layer.graph, layer.node) and _lacks_pair(layer):
        yield _warning("pair-missing", "no Q/DQ pair follows it", "quantize its output")


def _lacks_pair(layer: Layer) -> bool:
    """Whether no pair follows, not even after what may stand between."""
    readers = layer.graph.readers.get(layer.node.output[0], [])
    between = {"BatchNormalization"} if layer.operator in BEFORE_BATCH_NORM else set()
    between |= {"Relu", "Clip"} if layer.operator in BEFORE_RELU else set()
    if len(readers) == 1 and readers[0].op_type in between:
        return _lacks_pair(Layer(layer.graph, readers[0]))
    if layer.operator == "MatMul" and len(readers) == 1 and _belongs_to_product(layer.graph, readers[0]):
        return not any(_is_pair(layer.graph, name) for name in readers[0].output)
    return not any(_is_pair(layer.graph, name) for name in layer.node.output if name)


def _belongs_to_product(graph: Graph, node: NodeProto) -> bool:
    """Whether a node adds a bias to a product, or multiplies it by a constant: both count as one layer."""
    return node.op_type in ("Add", "Mul", "Div") and len(graph.fixed.intersection(node.input)) == 1


def _is_pair(graph: Graph, name: str) -> bool:
    """Whether a value is quantized by one that reads it, at once or after layers that only move it."""
    readers = graph.readers.get(name, [])
    return any(
        node.op_type == QUANTIZE or (node.op_type in MOVING and any(_is_pair(graph, out) for out in node.output))
        for node in readers
    )


@layer_rule(QUANTIZE)
def pair_inside(layer: Layer, device: Device) -> Iterator[Finding]:
    """No pair inside what TIDL takes for one layer."""
    pattern = inside(layer.graph, layer.node)
    if pattern is not None:
        yield _warning(
            "pair-inside",
            f"it stands inside {pattern}, which TIDL takes for one layer",
            f"quantize only the end of {pattern}",
        )
