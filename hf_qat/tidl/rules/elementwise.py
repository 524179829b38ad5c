"""Limits of operations on each number. Source: edgeai-tidl-tools, docs/operators.md."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from hf_qat.export.onnx_graph import get_attribute
from hf_qat.tidl.devices import Device
from hf_qat.tidl.graph import Layer, from_the_end
from hf_qat.tidl.rules.registry import Finding, layer_rule, newer_tools, operator_source


_SOURCE = operator_source("Max/Sum/Add/Mul/Div/Sub/Min")


@layer_rule("Add", "Mul", "Div", "Sub", "Max", "Min", "Sum")
def operands(layer: Layer, device: Device) -> Iterator[Finding]:
    """Two of them; a constant vector runs along channels or width."""
    if len(layer.inputs) != 2 and layer.operator != "Sum":
        yield Finding("eltwise-inputs", f"it has {len(layer.inputs)} inputs", "chain operations of two", _SOURCE)
        return
    if layer.operator == "Sub" and len(layer.variables) == 2 and not _centres(layer):
        yield newer_tools("a difference of two activations")
    for position in range(len(layer.node.input)):
        if not layer.varies(position) and len(layer.variables) == 1:
            yield from _vector(layer, position)


def _centres(layer: Layer) -> bool:
    """Whether a difference is the first step of a decomposed layer norm, which all tools know: x − mean(x)."""
    return any(maker.op_type == "ReduceMean" for name in layer.inputs if (maker := layer.graph.makers.get(name)))


def _vector(layer: Layer, position: int) -> Iterator[Finding]:
    constant, output = layer.shape(position), layer.output_shape
    if constant is None or output is None or len(output) < 3:
        return
    aligned = [1] * (len(output) - len(constant)) + [size or 1 for size in constant]
    long = [axis - len(aligned) for axis, size in enumerate(aligned) if size > 1]
    if len(long) == 1 and long[0] not in (-1, -3):
        yield Finding(
            "eltwise-vector",
            f"a constant vector along axis {long[0]}",
            "let it run along channels or width, or expand it to the shape of the other input",
            _SOURCE,
        )


@layer_rule("PRelu")
def slope(layer: Layer, device: Device) -> Iterator[Finding]:
    """A constant: one for all numbers, or one for each channel."""
    source, shape, slopes = operator_source("PRelu"), layer.shape(0), layer.shape(1)
    if layer.varies(1):
        yield Finding("prelu-slope", "its slope is computed", "make the slope a constant", source)
    if shape is None or slopes is None or len(shape) < 2:
        return
    axes = [len(shape) - len(slopes) + axis for axis, size in enumerate(slopes) if size != 1]
    if axes not in ([], [1]):
        yield Finding(
            "prelu-axis",
            f"slopes of the shape {list(slopes)} for an input of {list(shape)}",
            "use one slope, or one for each channel, (C, 1, 1)",
            source,
        )


@layer_rule("Clip")
def clip(layer: Layer, device: Device) -> Iterator[Finding]:
    """Around 0."""
    low, high = _bound(layer, 1, "min", -np.inf), _bound(layer, 2, "max", np.inf)
    if low is None or high is None:
        yield Finding("clip-variable", "its limits are computed", "make them constants", operator_source("Clip"))
    elif low > 0 or high <= 0:
        yield Finding(
            "clip-range",
            f"{low:g} to {high:g}",
            "use limits with min ≤ 0 and max > 0, as ReLU6 has",
            operator_source("Clip"),
        )


def _bound(layer: Layer, position: int, name: str, default: float) -> float | None:
    """A limit of `Clip`: an input from opset 11 on, an attribute before; `None` if it is computed."""
    if layer.has(position):
        value = layer.constant(position)
        return None if value is None else float(np.ravel(value)[0])
    return layer.number(name, default)


@layer_rule("Pow")
def power(layer: Layer, device: Device) -> Iterator[Finding]:
    """A constant exponent."""
    exponent = layer.constant(1)
    if exponent is None or exponent.size != 1:
        yield Finding(
            "pow-exponent", "its exponent is no single constant", "use one constant exponent", operator_source("Pow")
        )


@layer_rule("Cast")
def cast(layer: Layer, device: Device) -> Iterator[Finding]:
    """Only right after an input or right before an output."""
    first = layer.node.input[0] in {value.name for value in layer.graph.inputs}
    last = layer.node.output[0] in layer.graph.outputs
    if not first and not last:
        to = get_attribute(layer.node, "to")
        kind = TensorProto.DataType.Name(to) if isinstance(to, int) else "?"
        yield Finding(
            "cast-inside",
            f"a cast to {kind} in the middle of the model",
            "compute in float32 throughout, or cast only at inputs and outputs",
            operator_source("Cast"),
        )


@layer_rule("GridSample")
def grid_sample(layer: Layer, device: Device) -> Iterator[Finding]:
    """Nearest or bilinear, zeros outside, in two dimensions."""
    source, mode = operator_source("GridSample"), layer.text("mode", "bilinear")
    if mode not in ("nearest", "bilinear", "linear"):
        yield Finding("gridsample-mode", f"mode {mode}", "use nearest or bilinear", source)
    if layer.text("padding_mode", "zeros") != "zeros":
        yield Finding("gridsample-padding", "it does not pad with zeros", 'use padding_mode="zeros"', source)
    shape = layer.shape(0)
    if shape is not None and len(shape) != 4:
        yield Finding("gridsample-dims", f"its input has {len(shape)} axes", "sample images, (N, C, H, W)", source)


@layer_rule("ScatterND", "ScatterElements")
def scatter(layer: Layer, device: Device) -> Iterator[Finding]:
    """Into zeros, along the width."""
    source, reduction = operator_source("ScatterND/ScatterElements"), layer.text("reduction", "none")
    if reduction not in (("none",) if layer.operator == "ScatterElements" else ("none", "add", "max", "min")):
        yield Finding("scatter-reduction", f"reduction {reduction}", "use no reduction", source)
    shape = layer.shape(0)
    axis = layer.attribute("axis", 0)
    if layer.operator == "ScatterElements" and shape is not None and from_the_end(axis, len(shape)) != -1:
        yield Finding("scatter-axis", f"along axis {axis} of {len(shape)}", "scatter along the width", source)
    data = layer.constant(0)
    if not layer.varies(0) and data is not None and data.any():
        yield Finding("scatter-data", "it writes into a constant that is not 0", "write into zeros", source)
