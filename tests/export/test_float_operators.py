from __future__ import annotations

import pytest

from hf_qat.export.float_operators import count_quantize_nodes, float_operators, output_steps
from hf_qat.export.onnx_graph import with_shapes


ROUND = """
    q = QuantizeLinear (x, s, z)
    r = DequantizeLinear (q, s, z)
"""
ONES = ", ".join(["1"] * 16)
CONSTANTS = f"""<float s = {{0.5}}, uint8 z = {{0}}, float t = {{0.25}}, int64[2] flat = {{4, 4}},
    int8[4,4] codes = {{{ONES}}}, float[4,4] w = {{{ONES}}}>"""


def graph(parse, body):
    return with_shapes(parse(f"g (float[4,4] x) => (float[4,4] y) {CONSTANTS} {{ {body} }}"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"{ROUND} v = DequantizeLinear (codes, t) [m] y = MatMul (r, v)", {}),
        (f"{ROUND} [m] y = MatMul (r, w)", {"MatMul": ["m"]}),
        ("v = DequantizeLinear (codes, t) [m] y = MatMul (x, v)", {"MatMul": ["m"]}),
        (f"{ROUND} [e] e = Erf (r) [a] a = Add (e, w) [n] y = Mul (a, r)", {}),
        (f"{ROUND} [m] f = MatMul (r, w) [a] y = Relu (f)", {"MatMul": ["m"], "Relu": ["a"]}),
        (
            f"{ROUND} [m] f = MatMul (r, w) c = QuantizeLinear (f, s, z) d = DequantizeLinear (c, s, z) y = Neg (d)",
            {"MatMul": ["m"]},
        ),
        ("[t] f = Reshape (x, flat) y = Transpose (f)", {}),
        ("h = Shape (x) y = Reshape (x, h)", {}),
        ("[a] f = Abs (x) y = Reshape (f, flat)", {"Abs": ["a"]}),
    ],
    ids=[
        "quantized product",
        "float weight",
        "float input",
        "sequence between quantizers",
        "all behind a float layer",
        "until the next quantizer",
        "moving data is no computing",
        "shapes are no numbers",
        "behind a float input",
    ],
)
def test_float_operators_are_those_whose_inputs_no_quantizer_has_rounded(body, expected, parse):
    assert float_operators(graph(parse, body)) == expected


def test_the_step_of_an_output_is_the_scale_of_its_last_quantizer(parse):
    behind = "d = DequantizeLinear (q, t, z) f = Reshape (d, flat) y = Transpose (f)"
    assert output_steps(graph(parse, f"q = QuantizeLinear (x, t, z) {behind}")) == [0.25]
    assert output_steps(graph(parse, f"{ROUND} y = Relu (r)")) == [None]


def test_quantize_nodes_are_counted(parse):
    assert count_quantize_nodes(graph(parse, f"{ROUND} y = Relu (r)")) == 1
