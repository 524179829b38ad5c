"""Limits of pooling, resizing and reductions. Source: edgeai-tidl-tools, docs/operators.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log2, prod

import numpy as np

from hf_qat.export.onnx_graph import get_attribute
from hf_qat.tidl.devices import Device
from hf_qat.tidl.graph import Layer, from_the_end
from hf_qat.tidl.operators import GLOBAL_POOLING_PLANE, POOLING_KERNELS
from hf_qat.tidl.rules.convolution import window
from hf_qat.tidl.rules.registry import Finding, layer_rule, operator_source


_POOLING = "AveragePool/GlobalAveragePool/MaxPool"
_RESIZE = operator_source("Upsample/Resize")


@layer_rule("MaxPool", "AveragePool")
def pooling(layer: Layer, device: Device) -> Iterator[Finding]:
    """Kernels that TI has validated, without dilation."""
    source = operator_source(_POOLING)
    if set(layer.attributes("dilations", [1])) != {1}:
        yield Finding("pool-dilation", "it is dilated", "use dilation 1", source)
    if layer.attribute("storage_order", 0):
        yield Finding("pool-storage-order", "storage_order is 1", "use storage_order 0", source)
    if len([name for name in layer.node.output if name]) > 1:
        yield Finding("pool-indices", "it also returns indices", "use one output", source)
    shape = window(layer, layer.attributes("kernel_shape", [1, 1]))
    square = shape.kernel[0] == shape.kernel[1] and shape.strides[0] == shape.strides[1]
    if not square or (shape.kernel[0], shape.strides[0]) not in POOLING_KERNELS:
        yield Finding(
            "pool-kernel",
            f"kernel {shape}; TI has validated 3x3 and 1x1 with stride 1 or 2, and 2x2 with stride 2",
            "use one of these, or a convolution with a stride; global pooling as GlobalAveragePool",
            source,
        )


@layer_rule("GlobalAveragePool")
def global_pooling(layer: Layer, device: Device) -> Iterator[Finding]:
    """Over one or two axes, and not over large planes."""
    shape = layer.shape(0)
    if shape is None or None in shape[2:]:
        return
    if len(shape) > 4:
        yield Finding(
            "global-pool-dims",
            f"it averages over {len(shape) - 2} axes",
            "average over height and width only",
            operator_source(_POOLING),
        )
    plane = prod(size or 0 for size in shape[2:])
    if plane > GLOBAL_POOLING_PLANE:
        yield Finding(
            "global-pool-plane",
            f"it averages {plane} positions, of at most {GLOBAL_POOLING_PLANE}",
            "pool by 2x2 before",
            operator_source(_POOLING),
        )


@layer_rule("Resize", "Upsample")
def resize_method(layer: Layer, device: Device) -> Iterator[Finding]:
    """Interpolation that TIDL knows."""
    mode = layer.text("mode", "nearest")
    if mode not in ("nearest", "linear"):
        yield Finding("resize-mode", f"mode {mode}", 'use "nearest" or "bilinear"', _RESIZE)
        return
    where = layer.text("coordinate_transformation_mode", "half_pixel")
    if where not in ("half_pixel", "pytorch_half_pixel", "asymmetric"):
        yield Finding("resize-coordinates", where, "use align_corners=False", _RESIZE)
    elif mode == "linear" and where == "asymmetric":
        yield Finding("resize-coordinates", "linear and asymmetric", "use half_pixel with linear", _RESIZE)
    elif mode == "nearest":
        rounding = layer.text("nearest_mode", "round_prefer_floor")
        wanted = "floor" if where == "asymmetric" else "round_prefer_ceil"
        if rounding != wanted:
            yield Finding(
                "resize-rounding", f"nearest_mode {rounding} with {where}", f"use nearest_mode {wanted}", _RESIZE
            )
    if layer.attribute("antialias", 0):
        yield Finding("resize-antialias", "antialias is on", "use antialias=False", _RESIZE)
    if layer.attribute("exclude_outside", 0):
        yield Finding("resize-outside", "exclude_outside is 1", "use exclude_outside 0", _RESIZE)
    if layer.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        yield Finding("resize-aspect", "it keeps the aspect ratio", "use keep_aspect_ratio_policy stretch", _RESIZE)


@layer_rule("Resize", "Upsample")
def resize_factors(layer: Layer, device: Device) -> Iterator[Finding]:
    """Height and width by the same power of two."""
    before, after = layer.shape(0), layer.output_shape
    if before is None or after is None or None in (*before, *after) or len(before) != len(after):
        return
    factors = [large / small for large, small in zip(_known(after), _known(before), strict=True)]
    if any(factor != 1 for factor in factors[:-2]):
        yield Finding("resize-axes", "it resizes channels or the batch", "resize height and width only", _RESIZE)
        return
    height, width = factors[-2:] if len(factors) > 1 else (1.0, factors[-1])
    if min(height, width) < 1:
        yield Finding("resize-factor", f"it shrinks by {min(height, width):g}", "use pooling to shrink", _RESIZE)
    elif height != width:
        yield Finding(
            "resize-factor", f"height by {height:g}, width by {width:g}", "use the same factor for both", _RESIZE
        )
    elif not log2(height).is_integer():
        yield Finding("resize-factor", f"by {height:g}", "use a power of two", _RESIZE)


def _known(shape: Sequence[int | None]) -> list[int]:
    return [size or 1 for size in shape]


@layer_rule("ReduceMin", "ReduceMax")
def reduction(layer: Layer, device: Device) -> Iterator[Finding]:
    """Only along the height, which stays as an axis of size 1."""
    shape, axes, source = layer.shape(0), _axes(layer), operator_source("ReduceMin/ReduceMax")
    if shape is not None and [from_the_end(axis, len(shape)) for axis in axes] != [-2]:
        yield Finding("reduce-axis", f"it reduces axes {axes}", "reduce the height (axis −2) alone", source)
    if not layer.attribute("keepdims", 1):
        yield Finding("reduce-keepdims", "keepdims is 0", "use keepdims=True", source)


def _axes(layer: Layer) -> list[int]:
    given = get_attribute(layer.node, "axes")
    if isinstance(given, (list, tuple)):
        return list(given)
    constant = layer.constant(1)
    return [] if constant is None else np.ravel(constant).tolist()


@layer_rule("ArgMax", "ArgMin")
def best_class(layer: Layer, device: Device) -> Iterator[Finding]:
    """Only over channels, which stay as an axis of size 1."""
    shape, source = layer.shape(0), operator_source("ArgMin/ArgMax")
    axis = layer.attribute("axis", 0)
    if shape is not None and from_the_end(axis, len(shape)) != -3:
        yield Finding("argmax-axis", f"axis {axis}", "take it over the channels of (N, C, H, W)", source)
    if not layer.attribute("keepdims", 1):
        yield Finding("argmax-keepdims", "keepdims is 0", "use keepdims=True", source)
    if layer.attribute("select_last_index", 0):
        yield Finding("argmax-last", "select_last_index is 1", "use select_last_index 0", source)


@layer_rule("TopK")
def top_k(layer: Layer, device: Device) -> Iterator[Finding]:
    """Sorted, with a constant k, along width or height."""
    shape, source = layer.shape(0), operator_source("TopK")
    if not layer.attribute("sorted", 1):
        yield Finding("topk-sorted", "sorted is 0", "use sorted=True", source)
    if layer.constant(1) is None:
        yield Finding("topk-k", "k is computed by the model", "make k a constant", source)
    axis = layer.attribute("axis", -1)
    if shape is not None and from_the_end(axis, len(shape)) not in (-1, -2):
        yield Finding("topk-axis", f"axis {axis}", "take it along width or height", source)
