from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from hf_qat.export.cleanup import (
    PASSES,
    clean_up,
    drop_additions_of_zero,
    drop_axes_of_single_scales,
    drop_dead_nodes,
    drop_exporter_notes,
    drop_unused_opsets,
    drop_unused_values,
    infer_shapes,
    move_constants_to_initializers,
    pool_globally,
    quantize_constants,
    set_metadata,
)
from hf_qat.export.opset import lower_opset


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("improve", [*PASSES, clean_up], ids=lambda function: function.__name__)
def test_no_pass_changes_what_a_hugging_face_model_computes(improve, hugging_face_export, run_onnx):
    exported, pixels = hugging_face_export
    (expected,) = run_onnx(exported, pixels)
    model = lower_opset(exported, 17)

    improve(model)

    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run_onnx(model, pixels)[0], expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_a_cleaned_model_has_no_leftovers(hugging_face_export):
    model = clean_up(lower_opset(hugging_face_export[0], 17))
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert "Constant" not in operators(model)
    assert b"File \\" not in model.SerializeToString()
    assert all(info.type.tensor_type.HasField("shape") for info in model.graph.value_info)
    assert {name for node in model.graph.node for name in node.output} == {
        value.name for value in (*model.graph.value_info, *model.graph.output)
    }


def test_cleaning_twice_changes_nothing_more(hugging_face_export):
    once = clean_up(lower_opset(hugging_face_export[0], 17))
    operators_once = operators(once)
    assert operators(clean_up(once)) == operators_once


class Pooled(nn.Module):
    """A mean over the image, written in the given way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "module":
            return self.pool(x).flatten(1)
        return x.mean([2, 3]) if self.kind == "mean" else x.mean([-1, -2], keepdim=True)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("kind", ["module", "mean", "mean_with_kept_axes"])
def test_global_average_pooling_leaves_as_its_own_operator(kind, opset, stock_export, run_onnx):
    x = torch.randn(2, 3, 5, 7)
    model = clean_up(lower_opset(stock_export(Pooled(kind), x), opset))
    assert operators(model)[0] == "GlobalAveragePool"
    assert "ReduceMean" not in operators(model)
    np.testing.assert_allclose(run_onnx(model, x.numpy())[0], Pooled(kind)(x).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[2,3,4] x) => (float y) <int64[1] axes = {2}> { y = ReduceMean (x, axes) }",
        "g (float[2,3,4,5] x) => (float y) <int64[2] axes = {1, 2}> { y = ReduceMean (x, axes) }",
        "g (float[2,3,4,5] x) => (float y) { y = ReduceMean (x) }",
        "g (float[2,3,4,5] x) => (float y) <int64[2] axes = {2, 3}> { y = ReduceMax (x, axes) }",
    ],
    ids=["three axes", "other axes", "all axes", "maximum"],
)
def test_other_reductions_stay(graph, parse):
    model = parse(graph)
    before = operators(model)
    pool_globally(model)
    assert operators(model) == before


@pytest.mark.parametrize("opset", [17, 18])
def test_layer_norm_leaves_as_one_node_and_gelu_as_the_sequence_around_erf(opset, stock_export):
    model = clean_up(lower_opset(stock_export(nn.Sequential(nn.LayerNorm(8), nn.GELU()), torch.randn(2, 8)), opset))
    assert operators(model) == ["LayerNormalization", "Div", "Erf", "Add", "Mul", "Mul"]


@pytest.mark.parametrize(
    ("dtype", "zero_point"), [(np.uint8, 7), (np.int8, 0), (np.int8, -3)], ids=["uint8", "int8", "int8 with offset"]
)
def test_a_quantized_constant_becomes_its_codes(dtype, zero_point, parse, run_onnx):
    model = parse("""g (float[64] x) => (float y) {
        codes = QuantizeLinear (w, s, z)
        real = DequantizeLinear (codes, s, z)
        y = Add (x, real)
    }""")
    w = np.random.default_rng(0).normal(scale=30, size=64).astype(np.float32)
    w[:4] = [0.125, 0.375, -0.125, 1e9]  # ties, and one that saturates
    for name, value in {"w": w, "s": np.float32(0.25), "z": dtype(zero_point)}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    zeros = np.zeros(64, np.float32)
    (expected,) = run_onnx(model, zeros)

    quantize_constants(model)
    drop_unused_values(model)

    assert operators(model) == ["DequantizeLinear", "Add"]
    assert {tensor.name for tensor in model.graph.initializer} == {"codes", "s", "z"}
    np.testing.assert_array_equal(run_onnx(model, zeros)[0], expected)


def test_adding_zeros_goes_unless_it_makes_the_tensor_larger(parse, run_onnx):
    model = parse("""g (float[2,1] x) => (float y)
    <float[1] none = {0.0}, float[2] some = {0.0, 1.0}, float[1,3] wider = {0, 0, 0}> {
        a = Add (x, none)
        b = Add (none, a)
        c = Add (b, wider)
        d = Add (x, some)
        e = MatMul (d, c)
        y = Relu (e)
    }""")
    infer_shapes(model)
    x = np.array([[1.0], [-2.0]], np.float32)
    (expected,) = run_onnx(model, x)

    drop_additions_of_zero(model)

    assert operators(model) == ["Add", "Add", "MatMul", "Relu"]
    assert list(model.graph.node[0].input) == ["x", "wider"]
    np.testing.assert_array_equal(run_onnx(model, x)[0], expected)


def test_constant_nodes_become_initializers(parse, run_onnx):
    model = parse("""g (float[2] x) => (float y) {
        one = Constant <value_float = 1.0> ()
        two = Constant <value = float[2] {2.0, 3.0}> ()
        z = Add (x, one)
        y = Mul (z, two)
    }""")
    move_constants_to_initializers(model)
    assert operators(model) == ["Add", "Mul"]
    np.testing.assert_array_equal(run_onnx(model, np.array([1.0, 2.0], np.float32))[0], [4.0, 9.0])


def test_dead_nodes_and_unused_initializers_go_but_not_what_a_branch_reads(parse):
    model = parse("""g (float[2] x, bool c) => (float y) <float[2] used = {1, 2}, float[2] unused = {1, 2}> {
        dead = Neg (x)
        deader = Neg (dead)
        kept = Abs (x)
        y = If (c) <
            then_branch = yes () => (float[2] t) { t = Add (kept, used) },
            else_branch = no () => (float[2] e) { e = Identity (kept) }
        >
    }""")
    drop_dead_nodes(model)
    drop_unused_values(model)
    assert operators(model) == ["Abs", "If"]
    assert [tensor.name for tensor in model.graph.initializer] == ["used"]


def test_operator_sets_without_a_node_go(parse):
    model = parse("g (float[2] x) => (float y) { y = Relu (x) }", imports=', "com.example" : 1')
    drop_unused_opsets(model)
    assert [entry.domain for entry in model.opset_import] == [""]


def test_notes_go_from_nodes_values_and_initializers(parse):
    model = parse("g (float[2] x) => (float y) <float[2] w = {1, 2}> { z = Add (x, w) y = Relu (z) }")
    infer_shapes(model)
    noted = [*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.value_info, model.graph]
    for item in noted:
        item.doc_string = "a secret"
        item.metadata_props.add(key="path", value="a secret")
    drop_exporter_notes(model)
    assert b"a secret" not in model.SerializeToString()


def test_metadata_is_added_and_overwritten_by_key(parse):
    model = parse("g (float[2] x) => (float y) { y = Relu (x) }")
    set_metadata(model, {"a": "1", "b": "2"})
    set_metadata(model, {"b": "3"})
    assert Counter((entry.key, entry.value) for entry in model.metadata_props) == Counter([("a", "1"), ("b", "3")])


def test_a_pair_with_one_scale_has_no_axis_and_one_with_several_keeps_it(parse):
    model = parse(
        "g (int8[3, 4] x) => (float[3, 4] y) <float step = {0.5}, int8 zero = {0}, float[4] steps = {1, 2, 3, 4}, "
        "int8[4] zeros = {0, 0, 0, 0}> { a = DequantizeLinear<axis = 1>(x, step, zero) "
        "b = QuantizeLinear<axis = 1>(a, step, zero) y = DequantizeLinear<axis = 1>(b, steps, zeros) }"
    )
    drop_axes_of_single_scales(model)
    assert [[a.name for a in node.attribute] for node in model.graph.node] == [[], [], ["axis"]]
