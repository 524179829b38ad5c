"""Limits of softmax, norms and what TIDL only takes fused. Source: edgeai-tidl-tools, docs/operators.md."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from hf_qat.tidl.devices import OPERATORS_DOC_11_0, TRANSFORMERS_DOC, Device
from hf_qat.tidl.graph import Layer, from_the_end
from hf_qat.tidl.operators import BATCH_NORM_DIMS
from hf_qat.tidl.rules.registry import Finding, layer_rule, newer_tools, operator_source


@layer_rule("Softmax")
def softmax(layer: Layer, device: Device) -> Iterator[Finding]:
    """Along width or height."""
    shape = layer.shape(0)
    axis = layer.attribute("axis", -1 if layer.graph.opset >= 13 else 1)
    if shape is not None and from_the_end(axis, len(shape)) not in (-1, -2):
        yield Finding(
            "softmax-axis",
            f"along axis {axis} of {len(shape)}",
            "transpose, so that it runs along the last or the last but one axis",
            operator_source("Softmax"),
        )


@layer_rule("LayerNormalization")
def layer_norm(layer: Layer, device: Device) -> Iterator[Finding]:
    """Along the width, with vectors of that size."""
    shape, axis, source = layer.shape(0), layer.attribute("axis", -1), operator_source("LayerNormalization")
    if shape is not None and from_the_end(axis, len(shape)) != -1:
        yield Finding(
            "layernorm-axis",
            f"over {-from_the_end(axis, len(shape))} axes",
            "normalize over the last axis alone; transpose channels to the end",
            source,
        )
    for position, what in ((1, "scale"), (2, "bias")):
        vector = layer.shape(position)
        if vector is not None and prod(size or 0 for size in vector[:-1]) != 1:
            yield Finding("layernorm-vectors", f"its {what} has the shape {list(vector)}", "use a vector", source)


@layer_rule("BatchNormalization")
def batch_norm(layer: Layer, device: Device) -> Iterator[Finding]:
    """With constant statistics, of fewer than 6 axes."""
    source, shape = operator_source("BatchNormalization"), layer.shape(0)
    if shape is not None and len(shape) >= BATCH_NORM_DIMS:
        yield Finding(
            "batchnorm-dims",
            f"its input has {len(shape)} axes, and must have fewer than {BATCH_NORM_DIMS}",
            "reshape to (N, C, H, W) before",
            source,
        )
    if layer.attribute("training_mode", 0):
        yield Finding("batchnorm-training", "training_mode is 1", "export the model in evaluation mode", source)
    if len(layer.variables) > 1:
        yield Finding("batchnorm-variable", "its parameters are computed by the model", "make them constants", source)


@layer_rule("InstanceNormalization")
def instance_norm(layer: Layer, device: Device) -> Iterator[Finding]:
    """With at least one axis of positions."""
    shape = layer.shape(0)
    if shape is not None and len(shape) < 3:
        source = operator_source("InstanceNormalization")
        yield Finding("instancenorm-dims", f"its input has {len(shape)} axes", "use (N, C, H, W)", source)


@layer_rule("Erf")
def gelu(layer: Layer, device: Device) -> Iterator[Finding]:
    """Only inside `x · ½ · (1 + erf(x / √2))`."""
    maker = layer.graph.makers.get(layer.node.input[0])
    readers = layer.graph.readers.get(layer.node.output[0], [])
    scaled = maker is not None and maker.op_type in ("Div", "Mul")
    if not scaled or [node.op_type for node in readers] != ["Add"]:
        yield Finding(
            "erf-alone",
            "not as a part of GELU, that is x · ½ · (1 + erf(x / √2))",
            "write GELU as torch.nn.GELU() does, with no quantizer inside",
            f"{operator_source('Erf/Identity')}; {TRANSFORMERS_DOC}",
        )


@layer_rule("Identity", "Dropout")
def does_nothing(layer: Layer, device: Device) -> Iterator[Finding]:
    """Not on their own."""
    yield Finding(
        "no-op",
        "TIDL takes it only as a part of other layers",
        "remove it: export in evaluation mode, then simplify the file (onnxsim)",
        operator_source(layer.operator),
    )


@layer_rule("ReduceMean")
def mean(layer: Layer, device: Device) -> Iterator[Finding]:
    """On its own in newer tools; in older ones as a part of layer norm."""
    readers = layer.graph.readers.get(layer.node.output[0], [])
    if not {node.op_type for node in readers} & {"Sub", "Add"}:  # the mean and the variance of a layer norm
        found = newer_tools("ReduceMean outside a layer norm")
        yield Finding(found.rule, found.why, "use GlobalAveragePool", OPERATORS_DOC_11_0, "warning")


@layer_rule("Sigmoid", "HardSigmoid", "Tanh", "Elu", "Softmax", "Erf")
def look_up_tables(layer: Layer, device: Device) -> Iterator[Finding]:
    """Slow without a table."""
    if not device.lut.value:
        yield Finding(
            "no-lut",
            f"{device.name} has no look-up table for it: it is slow",
            "use ReLU where speed matters",
            device.lut.source,
            "warning",
        )
