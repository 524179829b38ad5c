"""Limits of matrix products. Source: edgeai-tidl-tools, docs/operators.md, row Gemm/MatMul."""

from __future__ import annotations

from collections.abc import Iterator

from hf_qat.tidl.devices import Device
from hf_qat.tidl.graph import Layer
from hf_qat.tidl.rules.registry import Finding, layer_rule, operator_source


_SOURCE = operator_source("Gemm/MatMul")


@layer_rule("Gemm")
def gemm(layer: Layer, device: Device) -> Iterator[Finding]:
    """A fully connected layer, with nothing added to it."""
    if layer.attribute("transA", 0):
        yield Finding("gemm-transposed", "transA is 1", "transpose its input before", _SOURCE)
    for name in ("alpha", "beta"):
        if layer.number(name, 1.0) != 1.0:
            yield Finding(
                "gemm-factors",
                f"{name} is {layer.number(name, 1.0):g}",
                f"fold {name} into weights and bias",
                _SOURCE,
            )
    if len(layer.variables) > 1:
        yield Finding("gemm-variable", "it multiplies two activations", "use MatMul", _SOURCE)
    bias, output = layer.shape(2), layer.output_shape
    if bias is not None and output is not None and tuple(bias) not in ((output[-1],), (1, output[-1])):
        yield Finding(
            "gemm-bias",
            f"its bias has the shape {list(bias)}, its output is {output[-1]} wide",
            "use a bias with one value for each output, or MatMul and Add",
            _SOURCE,
        )


@layer_rule("MatMul", "Gemm")
def weights_have_two_dimensions(layer: Layer, device: Device) -> Iterator[Finding]:
    """A vector is no matrix."""
    shape = layer.shape(1)
    if shape is not None and len(shape) < 2:
        yield Finding("matmul-vector", "its second input is a vector", "make it a matrix with one column", _SOURCE)


@layer_rule("MatMul")
def signs(layer: Layer, device: Device) -> Iterator[Finding]:
    """Which of its three tensors may be signed, where two activations are multiplied.

    A tensor is unsigned if its quantizer cannot write a number below 0.
    """
    if len(layer.variables) < 2:
        return
    inputs = [layer.graph.before(name) for name in layer.inputs[:2]]
    output = layer.graph.after(layer.node.output[0])
    unsigned = [None if quantizer is None else quantizer.non_negative for quantizer in inputs]
    if None in unsigned:
        return
    if len(set(unsigned)) == 2 and not device.mixed_sign_matmul.value:
        yield Finding(
            "matmul-mixed-signs",
            f"{device.name} does not multiply a signed by an unsigned activation",
            "quantize both with int8 and zero point 0",
            device.mixed_sign_matmul.source,
        )
    if not any(unsigned) and output is not None and output.non_negative:
        yield Finding(
            "matmul-unsigned-output",
            "both inputs are signed, the output is not",
            "quantize the output with a range that has negative numbers",
            _SOURCE,
        )
