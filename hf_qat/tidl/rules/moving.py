"""Limits of layers that only move numbers. Source: edgeai-tidl-tools, docs/operators.md."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_qat.export.onnx_graph import Shape, get_attribute
from hf_qat.tidl.devices import Device
from hf_qat.tidl.graph import Layer, from_the_end
from hf_qat.tidl.operators import MOST_DIMS, SLICE_DIMS
from hf_qat.tidl.rules.registry import Finding, layer_rule, operator_source


@layer_rule("Concat")
def concat(layer: Layer, device: Device) -> Iterator[Finding]:
    """Along channels, height or width."""
    shape, axis, source = layer.output_shape, layer.attribute("axis", 0), operator_source("Concat")
    if shape is None:
        return
    if from_the_end(axis, len(shape)) not in (-1, -2, -3):
        yield Finding("concat-axis", f"along axis {axis} of {len(shape)}", "use one of the last three axes", source)


@layer_rule("Slice")
def slice_(layer: Layer, device: Device) -> Iterator[Finding]:
    """Constant limits, step 1."""
    source = operator_source("Slice/Split")
    if any(layer.varies(position) for position in (1, 2, 3, 4)):
        yield Finding("slice-variable", "its limits are computed", "make starts and ends constants", source)
    steps = layer.constant(4)
    if steps is not None and set(np.ravel(steps).tolist()) != {1}:
        yield Finding(
            "slice-step",
            f"step {'x'.join(str(step) for step in np.ravel(steps))}",
            "slice with step 1; TIDL takes steps only in Swin's patch merging, with channels last",
            source,
        )
    yield from _sliced_axes(layer, _slice_axes(layer), source)


def _slice_axes(layer: Layer) -> list[int]:
    given = get_attribute(layer.node, "axes")  # an input from opset 10 on
    if isinstance(given, (list, tuple)):
        return list(given)
    axes, starts = layer.constant(3), layer.constant(1)
    if axes is not None:
        return [int(axis) for axis in np.ravel(axes)]
    return [] if starts is None else list(range(starts.size))


@layer_rule("Split")
def split(layer: Layer, device: Device) -> Iterator[Finding]:
    """A row of slices."""
    yield from _sliced_axes(layer, [layer.attribute("axis", 0)], operator_source("Slice/Split"))


def _sliced_axes(layer: Layer, axes: list[int], source: str) -> Iterator[Finding]:
    shape = layer.shape(0)
    if shape is None:
        return
    if len(shape) != SLICE_DIMS:
        yield Finding("slice-dims", f"its input has {len(shape)} axes", "reshape to 4 axes before", source)
    if len(shape) == 4 and shape[0] not in (1, None):
        yield Finding("slice-batch", f"the batch is {shape[0]}", "export with a batch of 1", source)
    if len(shape) == 4 and any(from_the_end(axis, 4) == -4 for axis in axes):
        yield Finding("slice-batch-axis", "it slices the batch", "slice channels, height or width", source)


@layer_rule("Gather")
def gather(layer: Layer, device: Device) -> Iterator[Finding]:
    """Rows of an activation, named by a vector."""
    source, shape, indices = operator_source("Gather"), layer.shape(0), layer.shape(1)
    if not layer.varies(0):
        yield Finding("gather-data", "it looks up rows of a constant", "gather from an activation", source)
    if indices is not None and len(indices) != 1:
        yield Finding(
            "gather-indices",
            f"its indices have {len(indices)} axes",
            "use a vector of indices: x[:, 0:1] and a reshape, in place of x[:, 0]",
            source,
        )
    if shape is None:
        return
    if len(shape) < 2:
        yield Finding("gather-dims", "its input is a vector", "gather from a matrix", source)
    axis = from_the_end(layer.attribute("axis", 0), len(shape))
    if any(size not in (1, None) for size in shape[:axis]):
        yield Finding(
            "gather-axis",
            f"axis {axis} of {list(shape)}: sizes before the axis are above 1",
            "transpose, so that only sizes of 1 come before the axis",
            source,
        )


@layer_rule("Reshape")
def reshape(layer: Layer, device: Device) -> Iterator[Finding]:
    """To a constant shape."""
    source = operator_source("Reshape")
    if layer.varies(1):
        yield Finding(
            "reshape-variable",
            "its shape is computed",
            "export with fixed sizes, then fold constants (onnxsim)",
            source,
        )
    if layer.attribute("allowzero", 0):
        yield Finding(
            "reshape-allowzero",
            "allowzero is 1",
            "set allowzero to 0: it means the same where the shape has no 0 (export_tidl does so)",
            source,
        )


@layer_rule("Unsqueeze")
def unsqueeze(layer: Layer, device: Device) -> Iterator[Finding]:
    """Not to more axes than TIDL has."""
    shape = layer.output_shape
    if shape is not None and len(shape) > MOST_DIMS:
        why = f"its output has {len(shape)} axes, of at most {MOST_DIMS}"
        yield Finding("unsqueeze-dims", why, "leave out axes of size 1", operator_source("Unsqueeze"))


@layer_rule("Expand")
def expand(layer: Layer, device: Device) -> Iterator[Finding]:
    """To a constant shape."""
    if layer.varies(1):
        yield Finding("expand-variable", "its shape is computed", "export with fixed sizes", operator_source("Expand"))


@layer_rule("Transpose")
def transpose(layer: Layer, device: Device) -> Iterator[Finding]:
    """The width does not become one of the first two of more than four axes."""
    shape = layer.shape(0)
    order = layer.attributes("perm", [])
    if shape is not None and len(shape) > 4 and len(shape) - 1 in order[:2]:
        yield Finding(
            "transpose-width",
            f"of {len(shape)} axes, it moves the last one to place {order.index(len(shape) - 1)}",
            "transpose in two steps, of at most 4 axes each",
            operator_source("Transpose"),
        )


@layer_rule("Pad")
def pad(layer: Layer, device: Device) -> Iterator[Finding]:
    """With zeros, height and width."""
    source, mode = operator_source("Pad"), layer.text("mode", "constant")
    if mode != "constant":
        yield Finding("pad-mode", f"mode {mode}", "pad with zeros", source)
    value = layer.constant(2)
    if layer.varies(2) or (value is not None and value.size and float(np.ravel(value)[0]) != 0.0):
        yield Finding("pad-value", "it does not pad with 0", "pad with zeros", source)
    pads, shape = _pads(layer), layer.shape(0)
    if pads is None:
        yield Finding("pad-variable", "its pads are computed", "make them constants", source)
    elif shape is not None and _touches_channels(pads, layer, shape):
        yield Finding("pad-axes", "it pads channels or the batch", "pad height and width only", source)


def _pads(layer: Layer) -> list[int] | None:
    if not layer.has(1):
        return layer.attributes("pads", [])
    constant = layer.constant(1)
    return None if constant is None else [int(size) for size in np.ravel(constant)]


def _touches_channels(pads: list[int], layer: Layer, shape: Shape) -> bool:
    axes = layer.constant(3)
    named = list(range(len(shape))) if axes is None else [int(axis) for axis in np.ravel(axes)]
    sizes = dict.fromkeys(named, 0)
    for position, size in enumerate(pads):
        sizes[named[position % len(named)]] += abs(size)
    return any(size and from_the_end(axis, len(shape)) < -2 for axis, size in sizes.items())


@layer_rule("DepthToSpace", "SpaceToDepth")
def space_and_depth(layer: Layer, device: Device) -> Iterator[Finding]:
    """Of images whose sizes are multiples of the block."""
    shape, block, source = layer.shape(0), layer.attribute("blocksize", 1), operator_source(layer.operator)
    if shape is None or None in shape:
        return
    if len(shape) != 4:
        yield Finding("space-dims", f"its input has {len(shape)} axes", "use (N, C, H, W)", source)
        return
    channels, height, width = (size or 0 for size in shape[1:])
    fits = channels % block**2 == 0 if layer.operator == "DepthToSpace" else not (height % block or width % block)
    if not fits:
        yield Finding("space-block", f"{list(shape)} is no multiple of the block {block}", "pad it before", source)
