"""`check_tidl` against TI's docs/operators.md: planted violations, and what TI lists as supported."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnxruntime.quantization import quantize_dynamic

from hf_qat import check_tidl
from hf_qat.errors import ConfigError, ExportError
from hf_qat.tidl import rules
from tests.tidl.cases import DEVICES
from tests.tidl.layers import from_text, one_layer
from tests.tidl.planted import (
    IMAGE,
    PLANTED,
    TOKENS,
    attention,
    conv,
    float_weights,
    four_bits,
    ints,
    qdq,
    resize,
    weights,
)


#: What the rules make findings with.
FINDINGS = {"Finding", "_refused", "_warning"}


def test_every_rule_has_a_planted_violation():
    calls = [
        node for file in Path(rules.__file__).parent.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ]
    findings = [call for call in calls if isinstance(call, ast.Call) and ast.unparse(call.func) in FINDINGS]
    named = {call.args[0].value for call in findings if isinstance(call.args[0], ast.Constant)}
    assert named | {"dims", "operator"} == set(PLANTED) and len(named) >= 90


@pytest.mark.parametrize("rule", PLANTED)
def test_each_planted_violation_is_found_with_its_verdict_reason_and_source(rule, saved):
    device, verdict, make = PLANTED[rule]
    report = check_tidl(saved(make()), device)
    found = [issue for issue in report.issues if issue.rule == rule]
    assert found and {issue.verdict for issue in found} == {verdict}
    assert all(issue.why and issue.remedy and issue.source for issue in found)
    assert report.ok == (verdict != "refused" and not [i for i in report.issues if i.verdict == "refused"])
    assert f"[{rule}]" in str(report)


@pytest.mark.parametrize("rule", [rule for rule, (_, verdict, _) in PLANTED.items() if verdict == "arm"])
def test_a_layer_with_a_broken_limit_runs_on_the_arm_core(rule, saved):
    device, _, make = PLANTED[rule]
    report = check_tidl(saved(make()), device)
    broken = {issue.layer for issue in report.issues if issue.rule == rule}
    assert broken and broken <= {layer.name for layer in report.on("arm")}


def gelu() -> onnx.ModelProto:
    return from_text(
        """g (float[1, 17, 16] x) => (float[1, 17, 16] z) <float r = {1.4142135}, float h = {0.5}, float one = {1.0}> {
            a = Div(x, r) b = Erf(a) c = Add(b, one) d = Mul(x, c) z = Mul(d, h) }"""
    )


def decomposed_layer_norm() -> onnx.ModelProto:
    return from_text(
        """g (float[1, 17, 16] x) => (float[1, 17, 16] z) <float two = {2.0}, float e = {1e-5}> {
            m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) p = Pow(d, two) v = ReduceMean<axes=[-1]>(p)
            w = Add(v, e) s = Sqrt(w) z = Div(d, s) }"""
    )


#: What TI's table or its documents list as supported.
SUPPORTED = {
    "conv 1x1": lambda: conv(1),
    "conv 3x3": lambda: conv(3, 1, 1),
    "conv 3x3 stride 2": lambda: conv(3, 2, 1),
    "conv 5x5": lambda: conv(5, 1, 2),
    "conv 7x7 stride 2": lambda: conv(7, 2, 3),
    "conv 11x11 stride 4": lambda: conv(11, 4, 5),
    "conv grouped": lambda: conv(3, 1, 1, group=2),
    "patch embedding 4x4": lambda: conv(4, 4),
    "patch embedding 16x16": lambda: conv(16, 16),
    "depthwise 3x3": lambda: conv(3, 1, 1, group=8),
    "depthwise 3x3 stride 2": lambda: conv(3, 2, 1, group=8),
    "depthwise 5x5 stride 2": lambda: conv(5, 2, 2, group=8),
    "depthwise 7x7": lambda: conv(7, 1, 3, group=8),
    "transposed 4x4": lambda: one_layer("ConvTranspose", IMAGE, weights(8, 8, 4, 4), strides=[2, 2], pads=[1] * 4),
    "transposed 2x2": lambda: one_layer("ConvTranspose", IMAGE, weights(8, 8, 2, 2), strides=[2, 2]),
    "max pool 3x3 stride 2": lambda: one_layer("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "max pool 2x2 stride 2": lambda: one_layer("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    "average pool 3x3": lambda: one_layer("AveragePool", IMAGE, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4),
    "global average pool": lambda: one_layer("GlobalAveragePool", [1, 8, 32, 32]),
    "relu6": lambda: one_layer("Clip", IMAGE, np.float32(0), np.float32(6)),
    "hard swish": lambda: one_layer("HardSwish", IMAGE),
    "add": lambda: one_layer("Add", IMAGE, second=IMAGE),
    "mul by channels": lambda: one_layer("Mul", IMAGE, second=[1, 8, 1, 1]),
    "add a vector along channels": lambda: one_layer("Add", IMAGE, weights(8, 1, 1)),
    "add a vector along width": lambda: one_layer("Add", TOKENS, weights(16)),
    "add positions": lambda: one_layer("Add", TOKENS, weights(1, 17, 16)),
    "gemm": lambda: one_layer("Gemm", [1, 16], weights(5, 16), weights(5), transB=1),
    "matmul with weights": lambda: one_layer("MatMul", TOKENS, weights(16, 32)),
    "attention": lambda: one_layer("MatMul", [1, 2, 17, 8], second=[1, 2, 8, 17]),
    "softmax along width": lambda: one_layer("Softmax", [1, 2, 17, 17], axis=-1),
    "softmax along height": lambda: one_layer("Softmax", [1, 2, 17, 17], axis=2),
    "layer norm": lambda: one_layer("LayerNormalization", TOKENS, weights(16), weights(16), axis=-1),
    "decomposed layer norm": decomposed_layer_norm,
    "gelu": gelu,
    "concat channels": lambda: one_layer("Concat", IMAGE, second=IMAGE, axis=1),
    "slice channels": lambda: one_layer("Slice", IMAGE, ints(0), ints(4), ints(1)),
    "resize linear by 2": lambda: resize([1, 1, 2, 2]),
    "resize linear by 4": lambda: resize([1, 1, 4, 4]),
    "resize nearest by 2": lambda: resize([1, 1, 2, 2], "nearest", "asymmetric", nearest_mode="floor"),
    "argmax": lambda: one_layer("ArgMax", IMAGE, axis=1),
    "reshape": lambda: one_layer("Reshape", TOKENS, ints(1, 272)),
    "transpose": lambda: one_layer("Transpose", IMAGE, perm=[0, 2, 3, 1]),
    "pad": lambda: one_layer("Pad", IMAGE, ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "gather rows": lambda: one_layer("Gather", TOKENS, ints(0), axis=1),
    "depth to space": lambda: one_layer("DepthToSpace", IMAGE, blocksize=2),
    "cast at the input": lambda: one_layer("Cast", IMAGE, to=1, kind=TensorProto.UINT8),
    "batch norm": lambda: one_layer("BatchNormalization", IMAGE, *[weights(8)] * 4),
    "batch norm of 5 axes": lambda: one_layer("BatchNormalization", [1, 8, 2, 2, 2], *[weights(8)] * 4),
    "global average pool over one axis": lambda: one_layer("GlobalAveragePool", [1, 8, 32]),
    "slopes by channels": lambda: one_layer("PRelu", IMAGE, weights(8, 1, 1)),
    "one slope": lambda: one_layer("PRelu", IMAGE, weights(1)),
    "scatter along the width": lambda: from_text(
        "g (float[1, 1, 2, 4] x) => (float[1, 1, 2, 4] z) <float[1, 1, 2, 4] c = {0,0,0,0,0,0,0,0}, "
        "int64[1, 1, 2, 4] i = {0,1,2,3,0,1,2,3}> { z = ScatterElements<axis = 3>(c, i, x) }"
    ),
    "unsqueeze to 6 axes": lambda: one_layer("Unsqueeze", [1, 2, 3, 1, 2], ints(0)),
    "per-channel weights": lambda: qdq(scale=0.3, zero=3, input_zero=0),
    "per-tensor weights, powers of two": lambda: qdq(weight_scales="one"),
    "signed attention": lambda: attention("int8", "int8", "int8"),
    "unsigned attention": lambda: attention("uint8", "uint8", "uint8"),
    "attention with probabilities": lambda: attention("uint8", "int8", "int8"),
}


#: Where TI's documents disagree: in its list of transformers, not in its table of operators.
WARNED = {"patch embedding 4x4": "conv-stride-4"}

#: What the first matrix accelerator does not have.
NOT_ON_TDA4VM = {"per-channel weights", "attention with probabilities"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SUPPORTED)
def test_what_ti_lists_as_supported_raises_no_alarm(case, device, saved):
    report = check_tidl(saved(SUPPORTED[case]()), device)
    if device == "TDA4VM" and case in NOT_ON_TDA4VM:
        assert {issue.verdict for issue in report.issues} & {"arm", "refused"}
        return
    expected = {"no-quantizers", "opset"}  # float models of one layer; Q/DQ in opset 21
    expected |= {"no-lut"} if device == "AM62A" else set()  # slow, and told so
    if case in WARNED:
        assert {issue.verdict for issue in report.issues if issue.rule == WARNED[case]} == {"warning"}
        expected.add(WARNED[case])
    assert [issue for issue in report.issues if issue.rule not in expected] == []
    assert {layer.runs_on for layer in report.layers} == {"accelerator"}


@pytest.mark.parametrize(
    ("make", "macs"),
    [
        (lambda: conv(3, 1, 1), 16 * 16 * 8 * 8 * 9),
        (lambda: conv(3, 2, 1, group=8), 8 * 8 * 8 * 9),
        (lambda: one_layer("ConvTranspose", IMAGE, weights(8, 4, 2, 2), strides=[2, 2]), 16 * 16 * 8 * 4 * 4),
        (lambda: one_layer("Gemm", [1, 16], weights(5, 16), transB=1), 80),
        (lambda: one_layer("MatMul", [1, 2, 17, 8], second=[1, 2, 8, 17]), 2 * 17 * 17 * 8),
        (lambda: one_layer("Relu", IMAGE), 0),
    ],
    ids=["conv", "depthwise", "transposed", "gemm", "matmul", "relu"],
)
def test_macs_are_those_worked_out_by_hand(make, macs, saved):
    report = check_tidl(saved(make()), "AM69A")
    assert (report.macs, report.accelerated_macs) == (macs, macs)


def test_macs_on_the_arm_core_are_counted_apart(saved):
    report = check_tidl(
        saved(
            from_text(
                """g (float[1, 4] x) => (float[1, 4] z) {
                w = Constant<value = float[4, 4] {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}>()
                y = Gemm(x, w) z = Gemm<alpha = 2.0>(y, w) }"""
            )
        ),
        "AM68A",
    )
    assert (report.macs, report.accelerated_macs) == (32, 16)
    assert "1 of 2 layers and 50.0% of 32 MACs on the accelerator, in 1 part" in str(report)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("a = Relu(x) b = Relu(a) z = Relu(b)", 1),
        ("a = Relu(x) b = Erf(a) z = Relu(b)", 2),
        ("a = Relu(x) b = Erf(a) z = Add(a, b)", 2),
        ("a = Relu(x) b = Relu(x) z = Add(a, b)", 1),
        ("a = Erf(x) z = Relu(a)", 1),
        ("a = Erf(x) z = Erf(a)", 0),
        ("a = Relu(x) b = Erf(a) c = Relu(b) d = Erf(c) z = Relu(d)", 3),
    ],
)
def test_parts_are_counted_by_crossings_to_the_arm_core(body, parts, saved):
    report = check_tidl(saved(from_text(f"g (float[1, 8] x) => (float[1, 8] z) {{ {body} }}")), "AM68A")
    assert report.subgraphs == parts


def test_more_parts_than_tidl_compiles_are_reported(saved):
    body = "".join(f"a{k} = Relu({f'b{k - 1}' if k else 'x'}) b{k} = Erf(a{k}) " for k in range(17))
    model = from_text(f"g (float[1, 8] x) => (float[1, 8] z) {{ {body} z = Relu(b16) }}")
    assert "subgraphs" in {issue.rule for issue in check_tidl(saved(model), "AM68A").issues}


def test_a_float_layer_in_a_quantized_model_is_named(saved):
    found = [issue for issue in check_tidl(saved(float_weights()), "AM68A").issues if issue.rule == "no-range"]
    assert [issue.why.split(",")[0] for issue in found] == ["its weights are float"]


def rules_of(model: onnx.ModelProto, saved, device: str = "AM68A") -> dict[str, str]:
    """Every rule that a model breaks, with its verdict."""
    return {issue.rule: issue.verdict for issue in check_tidl(saved(model), device).issues}


def test_a_slice_cuts_four_axes_no_fewer(saved):
    model = one_layer("Slice", TOKENS, ints(0), ints(4), ints(1))
    assert rules_of(model, saved)["slice-dims"] == "arm"


@pytest.mark.parametrize(
    ("kind", "zero", "rule", "verdict"),
    [
        ("uint8", 127, "scheme-middle-zero-point", "warning"),
        ("uint8", 128, "scheme-zero-point", "refused"),
        ("int8", 127, "scheme-zero-point", "refused"),
    ],
)
def test_of_all_zero_points_tda4vm_is_only_warned_of_the_one_that_ti_writes(kind, zero, rule, verdict, saved):
    found = rules_of(qdq(zero=zero, kind=kind, weight_scales="one"), saved, "TDA4VM")
    assert {name: said for name, said in found.items() if name.startswith("scheme")} == {rule: verdict}


@pytest.mark.parametrize("where", ["input", "value_info"])
def test_a_size_of_minus_one_is_refused(where, saved):
    model = from_text("g (float[1, 8] x) => (float[1, 8] z) { a = Relu(x) z = Relu(a) }")
    value = model.graph.input[0] if where == "input" else model.graph.value_info[0]
    value.type.tensor_type.shape.dim[0].dim_value = -1
    report = check_tidl(saved(model), "AM68A")
    assert not report.ok
    (found,) = (issue for issue in report.issues if issue.verdict == "refused")
    assert found.rule == ("dynamic-shape" if where == "input" else "shape-inference")
    assert where != "input" or "['-1', 8]" in found.why


def test_a_dynamically_quantized_file_is_not_called_float(saved, tmp_path):
    model = one_layer("MatMul", TOKENS, np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32))
    quantize_dynamic(saved(model), tmp_path / "dynamic.onnx")
    report = check_tidl(tmp_path / "dynamic.onnx", "AM68A")
    named = {issue.rule for issue in report.issues}
    assert "dynamic-ranges" in named and "no-quantizers" not in named
    assert "the model is float" not in str(report)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "low", "high"), [("int8", -8, 7), ("uint8", 0, 15)])
def test_activations_of_4_bits_are_refused(kind, low, high, device, saved):
    report = check_tidl(saved(four_bits(kind, low, high)), device)
    assert not report.ok and "TIDL refuses it" in str(report)
    (found,) = (issue for issue in report.issues if issue.rule == "qdq-bits")
    assert f"{low} to {high}" in found.why


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("global-pool-plane", "convert_large_global_avg_pooling_to_matmul"),
        ("softmax-axis", "convert_softmax_unsupported_axis_to_width"),
        ("concat-axis", "convert_concat_unsupported_axis_to_channel"),
        ("gather-indices", "convert_gather_scalar_to_1d"),
        ("gemm-bias", "convert_gemm_to_matmul_and_add"),
        ("operator", "replace_einsum_with_matmul_and_basic_ops"),
        ("unsqueeze-dims", "convert_unsqueeze_to_reshape"),
    ],
)
def test_a_remedy_names_the_rule_of_tis_optimizer_that_does_it(rule, name, saved):
    device, _, make = PLANTED[rule]
    found = next(issue for issue in check_tidl(saved(make()), device).issues if issue.rule == rule)
    assert found.remedy.endswith(f"apply {name} of TI's model optimizer")


def test_part_numbers_and_any_case_name_a_device(saved):
    path = saved(one_layer("Relu", IMAGE))
    assert check_tidl(path, "j721s2").target == "AM68A"
    assert check_tidl(path, "J721E").soc == "J721E"
    with pytest.raises(ConfigError, match="'AM68' is no device that TIDL runs on. Did you mean 'AM68A'"):
        check_tidl(path, "AM68")


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(ExportError, match="model.onnx"):
        check_tidl(tmp_path / "model.onnx", "AM68A")
    with pytest.raises(ExportError, match="nothing.onnx"):
        check_tidl(tmp_path / "nothing.onnx", "AM68A")


def test_the_report_is_json_data(saved):
    report = check_tidl(saved(conv(5, 4, 2)), "AM62A")
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["ok"], data["target"], data["accelerated_macs"]) == (True, "AM62A", 0)
    assert data["layers"] == [
        {
            "name": "layer",
            "operator": "Conv",
            "runs_on": "arm",
            "macs": 4 * 4 * 8 * 8 * 25,
            "tidl_layer": "TIDL_ConvolutionLayer",
        }
    ]
