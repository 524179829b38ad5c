"""Limits of convolutions. Source: edgeai-tidl-tools, docs/operators.md, rows Conv, ConvTranspose and DeformConv."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_qat.errors import ExportError
from hf_qat.tidl.devices import OPERATORS_DOC_11_0, TRANSFORMERS_DOC, Device
from hf_qat.tidl.graph import Layer
from hf_qat.tidl.operators import (
    DEPTHWISE_KERNELS,
    DEPTHWISE_KERNELS_SINCE_11_0,
    STRIDE_2_KERNEL,
    STRIDE_4_KERNEL,
    TRANSPOSED_KERNELS,
    TRANSPOSED_KERNELS_SINCE_11_0,
)
from hf_qat.tidl.rules.registry import Finding, layer_rule, newer_tools, operator_source


@dataclass(frozen=True)
class Window:
    """Size, step and padding of a kernel; `pads` are (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]

    def __str__(self) -> str:
        height, width = self.kernel
        return f"{height}x{width} with stride {'x'.join(map(str, sorted(set(self.strides))))}"


def window(layer: Layer, kernel: list[int]) -> Window:
    """The window of a convolution or pooling; one of one dimension is a window of height 1.

    Raises:
        ExportError: its attributes are for another number of dimensions.
    """
    axes = len(kernel)
    kernel = layer.attributes("kernel_shape", kernel)
    strides = layer.attributes("strides", [1] * axes)
    pads = layer.attributes("pads", [0] * 2 * axes)
    if not (len(kernel) == len(strides) == axes and len(pads) == 2 * axes):
        raise ExportError(f"{layer.name} is no {axes}-dimensional layer: {kernel=}, {strides=}, {pads=}.")
    if axes == 1:
        kernel, strides, pads = [1, *kernel], [strides[0], *strides], [0, pads[0], 0, pads[1]]
    return Window((kernel[0], kernel[1]), (strides[0], strides[1]), (pads[0], pads[1], pads[2], pads[3]))


@layer_rule("Conv", "ConvTranspose")
def one_variable_input(layer: Layer, device: Device) -> Iterator[Finding]:
    """Weights and bias are constants."""
    if len(layer.variables) > 1:
        yield Finding(
            "conv-variable-weights",
            "its weights are computed by the model",
            "make the weights a constant: fold what computes them",
            operator_source("Conv"),
        )


@layer_rule("Conv")
def convolution(layer: Layer, device: Device) -> Iterator[Finding]:
    """Kernels, strides and pads."""
    weights, source = layer.shape(1), operator_source("Conv")
    if weights is None or not 3 <= len(weights) <= 4 or None in weights:
        if weights is not None and len(weights) > 4:
            yield Finding("conv-dims", "it convolves over 3 dimensions", "use 2-dimensional convolutions", source)
        return
    shape = window(layer, [size or 0 for size in weights[2:]])
    if shape.strides[0] != shape.strides[1]:
        yield Finding(
            "conv-stride",
            f"its strides differ: {shape.strides[0]} and {shape.strides[1]}",
            "use the same stride along height and width",
            source,
        )
        return
    group, channels = layer.attribute("group", 1), layer.shape(0)
    depthwise = group > 1 and channels is not None and channels[1] == group
    yield from _depthwise(shape, source) if depthwise else _dense(shape, device, source)
    yield from _pads(layer, shape, device, source)


def _depthwise(shape: Window, source: str) -> Iterator[Finding]:
    kind = (*shape.kernel, shape.strides[0])
    if kind not in DEPTHWISE_KERNELS:
        listed = ", ".join(f"{h}x{w} stride {s}" for h, w, s in sorted(DEPTHWISE_KERNELS))
        yield Finding("conv-depthwise", f"depthwise {shape}", f"use one of these: {listed}", source)
    elif kind in DEPTHWISE_KERNELS_SINCE_11_0:
        yield newer_tools(f"depthwise {shape}")


def _dense(shape: Window, device: Device, source: str) -> Iterator[Finding]:
    stride, largest = shape.strides[0], max(shape.kernel)
    if stride == 3 and shape.kernel == (3, 3) and not device.conv_3x3_stride_3.value:
        yield Finding(
            "conv-3x3-stride-3",
            f"{device.name} does not take 3x3 with stride 3",
            "use stride 1 or 2",
            device.conv_3x3_stride_3.source,
        )
    elif stride == 2 and largest > STRIDE_2_KERNEL:
        yield Finding(
            "conv-kernel",
            f"kernel {shape}",
            f"use a kernel of at most {STRIDE_2_KERNEL} with stride 2",
            source,
        )
    elif stride == 4 and largest != STRIDE_4_KERNEL:
        yield from _stride_4(shape, source)


def _stride_4(shape: Window, source: str) -> Iterator[Finding]:
    named, remedy = "", "see in the compile log where it runs"
    if shape.kernel == (7, 7):  # the first layer of SegFormer, a model that TI lists as supported
        named = "SegFormer, which starts so"
        remedy += "; or apply convert_conv_7x7_stride4_to_stride1 of TI's model optimizer"
    elif shape.kernel == (4, 4) and not any(shape.pads):  # the first layer of Swin and ConvNeXt
        named = "patch embedding, which is this for patches of 4x4"
    if named:
        why = f"{shape} is not in TI's table of operators, but {named}, is in its list of transformers"
        yield Finding("conv-stride-4", why, remedy, f"{source}; {TRANSFORMERS_DOC}", "warning")
    else:
        remedy = f"use stride 2 twice, or a kernel of {STRIDE_4_KERNEL}x{STRIDE_4_KERNEL}"
        yield Finding("conv-stride-4", f"kernel {shape}", remedy, source)


def _pads(layer: Layer, shape: Window, device: Device, source: str) -> Iterator[Finding]:
    pixels = layer.shape(0)
    width = pixels[-1] if pixels else None
    pad = max(shape.pads[1], shape.pads[3])
    if width is not None and pad > width and not device.pad_wider_than_input.value:
        yield Finding(
            "conv-padding",
            f"it pads {pad} columns onto an input {width} wide",
            "pad less than the input is wide, or use larger images",
            device.pad_wider_than_input.source,
        )


@layer_rule("ConvTranspose")
def transposed_convolution(layer: Layer, device: Device) -> Iterator[Finding]:
    """Square kernels of 2, 3 or 4 with stride 2."""
    weights, source = layer.shape(1), operator_source("ConvTranspose")
    if weights is None or len(weights) != 4 or None in weights:
        return
    shape = window(layer, [size or 0 for size in weights[2:]])
    height, width = shape.kernel
    if shape.strides != (2, 2) or height != width or height not in TRANSPOSED_KERNELS:
        yield Finding(
            "transposed-kernel",
            f"kernel {shape}",
            "use a kernel of 4x4 or 2x2 with stride 2, or Resize and a convolution",
            source,
        )
    elif height in TRANSPOSED_KERNELS_SINCE_11_0:
        yield newer_tools(f"a transposed convolution of {shape}")
    if layer.attribute("group", 1) != 1:
        yield Finding(
            "transposed-group",
            "it has groups, which TI's newer table of operators no longer mentions and older ones excluded",
            "use group=1, or Resize and a convolution",
            f"{source}; {OPERATORS_DOC_11_0}",
        )
    if set(layer.attributes("dilations", [1])) != {1}:
        yield Finding("transposed-dilation", "it is dilated", "use dilation 1", source)


@layer_rule("DeformConv")
def deformable_convolution(layer: Layer, device: Device) -> Iterator[Finding]:
    """Only 3x3 with stride 1."""
    weights = layer.shape(1)
    if weights is not None and len(weights) == 4:
        shape = window(layer, [size or 0 for size in weights[2:]])
        if shape.kernel != (3, 3) or shape.strides != (1, 1):
            yield Finding("deform-kernel", f"kernel {shape}", "use 3x3 with stride 1", operator_source("DeformConv"))
