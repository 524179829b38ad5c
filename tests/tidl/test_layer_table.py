"""TI's table of layer restrictions (docs/quantization.md), transcribed row by row, and what `check_tidl` says."""

from __future__ import annotations

import pytest

from hf_qat import check_tidl
from tests.tidl.layers import from_text
from tests.tidl.planted import qdq, quantized, silu, transposed_per_channel


POOL = "<kernel_shape = [1, 1]>"

#: TIDL's layer → (operator, attributes, further inputs, activations, "Requires QDQ Nodes") of the table.
TABLE = {
    "PoolingLayer, max": ("MaxPool", POOL, "", "symmetric", "yes"),
    "PoolingLayer, average": ("AveragePool", POOL, "", "symmetric", "yes"),
    "ReLULayer": ("Relu", "", "", "symmetric", "yes"),
    "SoftMaxLayer": ("Softmax", "", "", "asymmetric", "yes"),
    "ConcatLayer": ("Concat", "<axis = 3>", "", "asymmetric", "yes"),
    "FlattenLayer": ("Flatten", "<axis = 3>", "", "asymmetric", "no"),
    "SigmoidLayer": ("Sigmoid", "", "", "symmetric", "yes"),
    "TanhLayer": ("Tanh", "", "", "symmetric", "yes"),
    "HardSigmoidLayer": ("HardSigmoid", "", "", "symmetric", "yes"),
    "ELULayer": ("Elu", "", "", "symmetric", "yes"),
    "TransposeLayer": ("Transpose", "<perm = [0, 1, 2, 3]>", "", "asymmetric", "no"),
    "DepthToSpaceLayer": ("DepthToSpace", "<blocksize = 1>", "", "symmetric", "yes"),
    "EltWiseLayer, Add": ("Add", "", ", d", "asymmetric", "yes"),
    "EltWiseLayer, Mul": ("Mul", "", ", d", "symmetric", "yes"),
    "EltWiseLayer, Sub": ("Sub", "", ", d", "symmetric", "yes"),
    "EltWiseLayer, Div": ("Div", "", ", half", "symmetric", "yes"),
    "EltWiseLayer, Max": ("Max", "", ", d", "symmetric", "yes"),
    "InnerProductLayer, two variables": ("MatMul", "", ", d", "symmetric", "yes"),
}

RULES = {"asymmetric-layer", "asymmetric-product", "asymmetric-input", "pair-missing", "pair-inside"}


def said(saved, model, device: str = "AM68A") -> set[str]:
    """The rules of this table that a model is told to break."""
    report = check_tidl(saved(model), device)
    found = {issue.rule: issue.verdict for issue in report.issues if issue.rule in RULES | {"per-channel-weights"}}
    assert set(found.values()) <= {"warning"} and report.ok
    return set(found)


@pytest.mark.parametrize("layer", TABLE)
def test_a_zero_point_is_warned_of_where_the_table_says_symmetric(layer, saved):
    operator, attributes, more, activations, _ = TABLE[layer]
    on_output = quantized(operator, attributes=attributes, more=more, zero=3)
    rule = "asymmetric-product" if layer.startswith("InnerProduct") else "asymmetric-layer"
    assert said(saved, on_output) == (set() if activations == "asymmetric" else {rule})
    without = quantized(operator, attributes=attributes, more=more, zero=0)
    assert said(saved, without) == set()
    on_input = quantized(operator, attributes=attributes, more=more, zero=0, input_zero=3)
    assert said(saved, on_input) == {"asymmetric-input"} | (set() if activations == "asymmetric" else {rule})


@pytest.mark.parametrize("layer", TABLE)
def test_a_missing_pair_is_warned_of_where_the_table_wants_one(layer, saved):
    operator, attributes, more, _, wants = TABLE[layer]
    model = quantized(operator, attributes=attributes, more=more, last=False)
    assert said(saved, model) == ({"pair-missing"} if wants == "yes" else set())


def test_a_pair_after_the_reshape_that_follows_is_enough(saved):
    model = from_text(
        """g (float[1, 4, 8, 8] x) => (float[1, 256] z) <float s = {0.25}, int8 o = {0}> {
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o)
            p = MaxPool<kernel_shape = [1, 1]>(d) y = Flatten(p)
            r = QuantizeLinear(y, s, o) z = DequantizeLinear(r, s, o) }"""
    )
    assert said(saved, model) == set()


@pytest.mark.parametrize(
    ("after", "rules"),
    [("y = Relu(c)", set()), ("y = Sigmoid(c)", {"pair-missing"}), ("y = HardSwish(c)", {"pair-missing"})],
    ids=["ReLU", "sigmoid", "hard swish"],
)
def test_a_convolution_needs_no_pair_in_front_of_a_relu_only(after, rules, saved):
    codes = ", ".join(["1"] * 16)
    model = from_text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] z)
        <float s = {{0.25}}, int8 o = {{0}}, int8[4, 4, 1, 1] w = {{{codes}}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o) v = DequantizeLinear(w, s, o)
            c = Conv(d, v) {after}
            r = QuantizeLinear(y, s, o) z = DequantizeLinear(r, s, o) }}"""
    )
    assert said(saved, model) == rules


@pytest.mark.parametrize(
    ("after", "rules"),
    [
        ("y = Add(p, b)", set()),
        ("y = Mul(p, half)", set()),
        ("y = Add(p, d)", {"pair-missing"}),
        ("y = Softmax(p)", {"pair-missing"}),
    ],
    ids=["bias", "factor", "sum of two activations", "softmax"],
)
def test_a_product_with_its_bias_or_factor_is_one_layer(after, rules, saved):
    codes = ", ".join(["1"] * 16)
    model = from_text(
        f"""g (float[1, 3, 4] x) => (float[1, 3, 4] z)
        <float s = {{0.25}}, int8 o = {{0}}, int8[4, 4] w = {{{codes}}}, float[4] b = {{1, 2, 3, 4}},
         float half = {{0.5}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o) v = DequantizeLinear(w, s, o)
            p = MatMul(d, v) {after}
            r = QuantizeLinear(y, s, o) z = DequantizeLinear(r, s, o) }}"""
    )
    assert said(saved, model) == rules


def test_convolutions_take_zero_points_and_one_scale_per_channel(saved):
    assert said(saved, qdq(scale=0.3, zero=3, input_zero=0)) == set()


def test_transposed_convolutions_take_one_scale(saved):
    assert said(saved, transposed_per_channel()) == {"per-channel-weights"}


def gelu(inside: bool = False, zero: int = 0) -> object:
    """x · ½ · (1 + erf(x / √2)) between pairs, and perhaps a pair inside."""
    between = "qe = QuantizeLinear(e, s, o) de = DequantizeLinear(qe, s, o)" if inside else ""
    return from_text(
        f"""g (float[1, 17, 16] x) => (float[1, 17, 16] z)
        <float r = {{1.4142135}}, float h = {{0.5}}, float one = {{1.0}}, float s = {{0.25}}, int8 o = {{0}},
         int8 oz = {{{zero}}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o)
            a = Div(d, r) e = Erf(a) {between} c = Add({"de" if inside else "e"}, one) m = Mul(d, c) y = Mul(m, h)
            u = QuantizeLinear(y, s, oz) z = DequantizeLinear(u, s, oz) }}"""
    )


def layer_norm(inside: bool = False, zero: int = 0) -> object:
    """A layer norm written out, between pairs, and perhaps a pair inside."""
    between = "qd = QuantizeLinear(n, s, o) dn = DequantizeLinear(qd, s, o)" if inside else ""
    name = "dn" if inside else "n"
    return from_text(
        f"""g (float[1, 17, 16] x) => (float[1, 17, 16] z)
        <float two = {{2.0}}, float e = {{1e-5}}, float s = {{0.25}}, int8 o = {{0}}, int8 oz = {{{zero}}}> {{
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o)
            m = ReduceMean<axes=[-1]>(d) n = Sub(d, m) {between} p = Pow({name}, two) v = ReduceMean<axes=[-1]>(p)
            w = Add(v, e) t = Sqrt(w) y = Div({name}, t)
            u = QuantizeLinear(y, s, oz) z = DequantizeLinear(u, s, oz) }}"""
    )


@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (lambda: silu(), set()),
        (lambda: silu(inside=True), {"pair-inside"}),
        (lambda: gelu(), set()),
        (lambda: gelu(inside=True), {"pair-inside"}),
        (lambda: gelu(zero=3), {"asymmetric-layer"}),  # TIDL's BatchNormLayer
        (lambda: layer_norm(), set()),
        (lambda: layer_norm(zero=3), set()),  # TIDL's LayerNormLayer
        (lambda: layer_norm(inside=True), {"pair-inside"}),
    ],
    ids=[
        "SiLU",
        "SiLU, pair inside",
        "GELU",
        "GELU, pair inside",
        "GELU, asymmetric",
        "layer norm",
        "layer norm, asymmetric",
        "layer norm, pair inside",
    ],
)
def test_patterns_want_a_pair_at_their_end_only_and_take_what_their_tidl_layer_takes(make, rules, saved):
    assert said(saved, make()) == rules
