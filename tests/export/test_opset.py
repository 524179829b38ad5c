from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from hf_qat.errors import ExportError
from hf_qat.export.opset import RULES, lower_opset


#: Operators that changed in opset 18 and that opset 17 cannot express.
REFUSED = {
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "CenterCropPad",
    "Col2Im",
    "OptionalGetElement",
    "OptionalHasElement",
}

X = "(float[2,6,5,7] x) => (float y)"

#: Graphs at opset 18 that have a twin at 17; each input is random.
LOWERED = {
    "reduce_mean": f"g {X} <int64[2] axes = {{2, 3}}> {{ y = ReduceMean <keepdims = 1> (x, axes) }}",
    "reduce_mean_without_keepdims": f"g {X} <int64[1] axes = {{-1}}> {{ y = ReduceMean <keepdims = 0> (x, axes) }}",
    "reduce_max_of_all": f"g {X} {{ y = ReduceMax (x) }}",
    "reduce_l2_of_no_axes_means_all": f"g {X} <int64[0] axes = {{}}> {{ y = ReduceL2 (x, axes) }}",
    "reduce_mean_that_does_nothing": f"g {X} {{ y = ReduceMean <noop_with_empty_axes = 1> (x) }}",
    "reduce_axes_in_a_constant_node": f"""g {X} {{
        axes = Constant <value_ints = [1]> ()
        y = ReduceSumSquare (x, axes)
    }}""",
    "resize": f"""g {X} <float[4] s = {{1, 1, 2, 2}}> {{
        y = Resize <mode = "linear", antialias = 0, keep_aspect_ratio_policy = "stretch"> (x, , s)
    }}""",
    "resize_all_axes": f"""g {X} <float[4] s = {{1, 1, 2, 2}}> {{
        y = Resize <mode = "nearest", axes = [0, 1, 2, 3]> (x, , s)
    }}""",
    "split_evenly": f"g {X} {{ a, y = Split <axis = 1, num_outputs = 2> (x) }}",
    "split_with_a_smaller_rest": f"g {X} {{ a, b, y = Split <axis = -1, num_outputs = 3> (x) }}",
    "split_by_sizes": f"g {X} <int64[2] sizes = {{5, 1}}> {{ a, y = Split <axis = 1> (x, sizes) }}",
    "pad_two_axes": f"""g {X} <int64[4] pads = {{1, 2, 3, 0}}, int64[2] axes = {{3, -2}}> {{
        y = Pad <mode = "constant"> (x, pads, , axes)
    }}""",
    "pad_all_axes": f'g {X} <int64[8] pads = {{0, 0, 1, 1, 0, 0, 2, 2}}> {{ y = Pad <mode = "reflect"> (x, pads) }}',
    "lp_pool": f"g {X} {{ y = LpPool <kernel_shape = [2, 2], dilations = [1, 1], ceil_mode = 0, p = 2> (x) }}",
    "mish": f"g {X} {{ y = Mish (x) }}",
    "group_normalization": """g (float[2,6,5,7] x) => (float[2,6,5,7] y)
    <float[3] scale = {1.5, 0.5, 2.0}, float[3] bias = {0.0, 1.0, -1.0}> {
        y = GroupNormalization <num_groups = 3, epsilon = 0.001> (x, scale, bias)
    }""",
    "scatter_that_adds": f"""g {X} <int64[2,1] at = {{1, 1}}> {{
        zero = Sub (x, x)
        y = ScatterND <reduction = "add"> (zero, at, x)
    }}""",
    "inside_a_branch": f"""g {X} <int64[1] axes = {{1}}, bool yes = {{1}}> {{
        y = If (yes) <
            then_branch = yes_graph () => (float[2,1,5,7] t) {{ t = ReduceMin (x, axes) }},
            else_branch = no_graph () => (float[2,1,5,7] e) {{ e = ReduceMax (x, axes) }}
        >
    }}""",
}
#: Graphs at opset 18 that have none, and a part of the reason that the error must give.
NOT_LOWERED = {
    "antialias": (f"g {X} <float[4] s> {{ [it] y = Resize <antialias = 1> (x, , s) }}", "antialias=1"),
    "aspect_ratio": (
        f'g {X} <int64[4] s> {{ [it] y = Resize <keep_aspect_ratio_policy = "not_larger"> (x, , , s) }}',
        "keep_aspect_ratio_policy=not_larger",
    ),
    "resize_of_some_axes": (f"g {X} <float[2] s> {{ [it] y = Resize <axes = [2, 3]> (x, , s) }}", r"axes \[2, 3\]"),
    "reduction_axes_at_run_time": (
        "g (float[2,6,5,7] x, int64[1] a) => (float y) { [it] y = ReduceMean (x, a) }",
        "axes are computed at run time",
    ),
    "split_of_unknown_size": (
        "g (float[2,N] x) => (float y) { [it] a, y = Split <axis = 1, num_outputs = 2> (x) }",
        "size of its input along axis 1",
    ),
    "scatter_max": (
        f'g {X} <int64[1,1] at, float[1,6,5,7] u> {{ [it] y = ScatterND <reduction = "max"> (x, at, u) }}',
        "reduction=max",
    ),
    "dilated_pooling": (
        f"g {X} {{ [it] y = LpPool <kernel_shape = [2, 2], dilations = [2, 2]> (x) }}",
        r"dilations=\[2, 2\]",
    ),
    "new_operator": (
        "g (int32[4] x) => (int32 y) { [it] y = BitwiseNot (x) }",
        "opset 17 has nothing that computes the same",
    ),
}


@pytest.mark.parametrize("graph", LOWERED.values(), ids=LOWERED.keys())
def test_a_lowered_operator_computes_what_the_specification_of_opset_18_says(graph, parse, run_onnx):
    model = parse(graph)
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 7), dtype=np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})

    lowered = lower_opset(model, 17)

    onnx.checker.check_model(lowered, full_check=True)
    assert {(entry.domain, entry.version) for entry in lowered.opset_import} == {("", 17)}
    np.testing.assert_allclose(run_onnx(lowered, x)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("graph", "reason"), NOT_LOWERED.values(), ids=NOT_LOWERED.keys())
def test_what_cannot_be_lowered_is_refused_with_node_reason_and_lowest_opset(graph, reason, parse):
    model = parse(graph)
    with pytest.raises(ExportError, match=f"'it'.*below opset 18.*{reason}.*opset_version=18"):
        lower_opset(model, 17)


def test_an_operator_that_onnx_does_not_have_is_refused(parse):
    with pytest.raises(ExportError, match="Nonsense.*no operator of ONNX"):
        lower_opset(parse("g (float[2] x) => (float y) { y = Nonsense (x) }"), 17)


def test_every_operator_that_changed_in_opset_18_is_either_lowered_or_refused():
    changed = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == "" and s.since_version == 18}
    assert changed == set(RULES) | REFUSED
    assert not set(RULES) & REFUSED


def test_functions_of_the_model_are_lowered_too(parse, run_onnx):
    model = parse(
        "g (float[2,3,4] x) => (float y) { y = own.spread (x) }",
        functions="""<opset_import: ["" : 18], domain: "own"> spread (x) => (y) {
            axes = Constant <value_ints = [2]> ()
            high = ReduceMax (x, axes)
            low = ReduceMin (x, axes)
            y = Sub (high, low)
        }""",
        imports=', "own" : 1',
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32)

    lowered = lower_opset(model, 17)

    onnx.checker.check_model(lowered, full_check=True)
    assert [entry.version for entry in lowered.functions[0].opset_import] == [17]
    np.testing.assert_array_equal(run_onnx(lowered, x)[0], x.max(2, keepdims=True) - x.min(2, keepdims=True))


def test_lowering_leaves_the_given_model_alone(parse):
    model = parse(LOWERED["split_with_a_smaller_rest"])
    before = model.SerializeToString()
    lower_opset(model, 17)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (18, 8), (21, 10)])
def test_the_ir_version_is_the_oldest_that_goes_with_the_opset(opset, ir_version, parse):
    model = parse("g (float[2] x) => (float y) { y = Relu (x) }", opset=opset)
    model.ir_version = 11
    assert lower_opset(model, opset).ir_version == ir_version


@pytest.mark.parametrize(
    ("of", "to", "message"),
    [
        (21, 17, "at opset 21 and cannot be brought to 17"),
        (18, 21, "export it at 21"),
        (18, 16, "choose one of 17, 18, 21"),
    ],
)
def test_other_steps_between_opsets_are_refused(of, to, message, parse):
    model = parse("g (float[2] x) => (float y) { y = Relu (x) }", opset=of)
    with pytest.raises(ExportError, match=message):
        lower_opset(model, to)


@pytest.mark.parametrize("to", [17, 18])
def test_codes_of_16_bits_are_refused_below_opset_21(to):
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], name="wide"),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], name="back"),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [
            helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [0.5]),
            helper.make_tensor("zero", onnx.TensorProto.INT16, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(ExportError, match="'wide'.*below opset 21.*16 bits.*opset_version=21"):
        lower_opset(model, to)


def test_hugging_face_exports_compute_the_same_at_opset_17(hugging_face_export, run_onnx):
    model, pixels = hugging_face_export
    (expected,) = run_onnx(model, pixels)

    lowered = lower_opset(model, 17)

    onnx.checker.check_model(lowered, full_check=True)
    assert [entry.version for entry in lowered.opset_import if entry.domain == ""] == [17]
    np.testing.assert_allclose(run_onnx(lowered, pixels)[0], expected, rtol=0, atol=1e-6 * abs(expected).max())
