"""Codes of weights are moved as the weights were: ONNX Runtime computes the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from hf_qat.export.cleanup import drop_dead_nodes
from hf_qat.export.weight_codes import split_quantized_weights, transpose_quantized_weights


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def with_scales(model: ModelProto, size: int) -> None:
    """A scale and a zero point for each channel."""
    scale = np.linspace(0.1, 0.5, size, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.int8), "zero"))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_transposition_of_a_quantized_weight_moves_into_its_codes(axis, parse, run_onnx):
    model = parse(
        f"""g (float[5,4] x) => (float y)
        <int8[3,4] codes = {{{", ".join(str(code) for code in range(-6, 6))}}}> {{
            weight = DequantizeLinear <axis = {axis}> (codes, scale, zero)
            turned = Transpose <perm = [1, 0]> (weight)
            y = MatMul (x, turned)
        }}"""
    )
    size = (3, 4)[axis]
    with_scales(model, size)
    x = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    (expected,) = run_onnx(model, x)

    transpose_quantized_weights(model)
    drop_dead_nodes(model)

    assert operators(model) == ["DequantizeLinear", "MatMul"]
    np.testing.assert_array_equal(run_onnx(model, x)[0], expected)


def test_the_transposition_of_an_activation_stays(parse):
    model = parse("""g (int8[3,4] x) => (float y) <float s = {0.5}> {
        real = DequantizeLinear (x, s)
        y = Transpose (real)
    }""")
    transpose_quantized_weights(model)
    assert operators(model) == ["DequantizeLinear", "Transpose"]


def test_the_one_scale_of_a_weight_has_no_axis_in_its_parts_either(parse, run_onnx):
    model = parse(
        f"""g (float[5,4] x) => (float y, float z)
        <int8[4,6] codes = {{{", ".join(str(code) for code in range(-12, 12))}}},
        float scale = {{0.5}}, int8 zero = {{0}}> {{
            weight = DequantizeLinear (codes, scale, zero)
            a, b = Split <axis = 1> (weight)
            y = MatMul (x, a)
            z = MatMul (x, b)
        }}""",
        opset=17,
    )
    x = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    expected = run_onnx(model, x)

    split_quantized_weights(model)
    drop_dead_nodes(model)

    constants = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    read = [[constants[name] for name in node.input] for node in model.graph.node[:2]]
    assert read == [[[4, 3], [], []]] * 2
    for found, wanted in zip(run_onnx(model, x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("opset", [17, 18], ids=["equal parts by default", "the number of parts is an attribute"])
@pytest.mark.parametrize("axis", [0, 1], ids=["scales of what is split", "scales of the other axis"])
@pytest.mark.parametrize("sizes", ["", ", sizes"], ids=["equal", "of two sizes"])
def test_the_parts_of_a_quantized_weight_are_parts_of_its_codes(axis, opset, sizes, parse, run_onnx):
    parts = " num_outputs = 2," if opset == 18 and not sizes else ""
    model = parse(
        f"""g (float[5,4] x) => (float y, float z)
        <int8[6,4] codes = {{{", ".join(str(code) for code in range(-12, 12))}}}, int64[2] sizes = {{4, 2}}> {{
            weight = DequantizeLinear <axis = {axis}> (codes, scale, zero)
            a, b = Split <{parts} axis = 0> (weight{sizes})
            turned = Transpose (a)
            other = Transpose (b)
            y = MatMul (x, turned)
            z = MatMul (x, other)
        }}""",
        opset=opset,
    )
    with_scales(model, (6, 4)[axis])
    x = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    expected = run_onnx(model, x)

    split_quantized_weights(model)
    transpose_quantized_weights(model)
    drop_dead_nodes(model)

    assert sorted(operators(model)) == ["DequantizeLinear"] * 2 + ["MatMul"] * 2
    for found, wanted in zip(run_onnx(model, x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_parts_of_an_activation_stay_parts(parse):
    model = parse("""g (int8[4,4] x) => (float y, float z) <float s = {0.5}> {
        real = DequantizeLinear (x, s)
        y, z = Split (real)
    }""")
    split_quantized_weights(model)
    assert operators(model) == ["DequantizeLinear", "Split"]
