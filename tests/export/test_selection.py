from __future__ import annotations

import numpy as np
import onnx
import pytest

from hf_qat.export.cleanup import drop_unused_values
from hf_qat.export.onnx_graph import with_shapes
from hf_qat.export.selection import select_directly


CONSTANTS = "int64[1] all = {8}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}, int64[1] four = {4}"

#: What is read of a sorted row → whether it is a selection of the first three.
CASES = {
    "values and places": ("y = Slice(v, zero, three, one, one) z = Slice(i, zero, three, one, one)", True),
    "with the default step": ("y = Slice(v, zero, three, one) z = Slice(i, zero, three, one)", True),
    "another number of places": ("y = Slice(v, zero, three, one) z = Slice(i, zero, four, one)", False),
    "the last values": ("y = Slice(v, three, all, one) z = Slice(i, three, all, one)", False),
    "rows": ("y = Slice(v, zero, one, zero) z = Slice(i, zero, one, zero)", False),
    "all values, too": (
        "w = Slice(v, zero, three, one) y = Concat<axis = 1>(w, v) z = Slice(i, zero, three, one)",
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_of_a_sorted_row_are_selected_directly(case, parse, run_onnx):
    body, direct = CASES[case]
    model = parse(
        f"g (float[2, 8] x) => (float[m, n] y, int64[p, q] z) <{CONSTANTS}> {{ "
        f"v, i = TopK<axis = 1>(x, all) {body} }}",
        opset=17,
    )
    x = np.random.default_rng(0).integers(0, 4, (2, 8)).astype(np.float32)
    expected = run_onnx(model, x)

    select_directly(model)
    drop_unused_values(model)

    onnx.checker.check_model(model, full_check=True)
    for got, wanted in zip(run_onnx(model, x), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert ([node.op_type for node in model.graph.node] == ["TopK"]) == direct


def test_values_that_nobody_reads_are_as_few_as_the_places(parse, run_onnx):
    body = "v, i = TopK<axis = 1>(x, all) z = Slice(i, zero, three, one)"
    model = with_shapes(parse(f"g (float[2, 8] x) => (int64[2, 3] z) <{CONSTANTS}> {{ {body} }}", opset=17))
    x = np.random.default_rng(0).standard_normal((2, 8), dtype=np.float32)
    (expected,) = run_onnx(model, x)

    select_directly(model)
    drop_unused_values(model)

    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run_onnx(model, x)[0], expected)
