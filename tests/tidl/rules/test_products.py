"""TI's row Gemm/MatMul."""

from __future__ import annotations

import pytest

from tests.tidl.layers import findings, one_layer
from tests.tidl.planted import attention, weights


#: Model, device, what is said of it.
CASES = {
    "a linear layer": (lambda: one_layer("Gemm", [4, 16], weights(5, 16), weights(5), transB=1), "AM68A", {}),
    "a row as its bias": (lambda: one_layer("Gemm", [4, 16], weights(16, 5), weights(1, 5)), "AM68A", {}),
    "a matrix as its bias": (
        lambda: one_layer("Gemm", [4, 16], weights(16, 5), weights(4, 5)),
        "AM68A",
        {"gemm-bias": "arm: its bias has the shape [4, 5], its output is 5 wide"},
    ),
    "half a product": (
        lambda: one_layer("Gemm", [4, 16], weights(16, 5), weights(5), alpha=0.5),
        "AM68A",
        {"gemm-factors": "arm: alpha is 0.5"},
    ),
    "twice the bias": (
        lambda: one_layer("Gemm", [4, 16], weights(16, 5), weights(5), beta=2.0),
        "AM68A",
        {"gemm-factors": "arm: beta is 2"},
    ),
    "a transposed input": (
        lambda: one_layer("Gemm", [16, 4], weights(16, 5), transA=1),
        "AM68A",
        {"gemm-transposed": "arm: transA is 1"},
    ),
    "a vector": (
        lambda: one_layer("MatMul", [4, 16], weights(16)),
        "AM68A",
        {"matmul-vector": "arm: its second input is a vector"},
    ),
    "probabilities times values": (lambda: attention("uint8", "int8", "int8"), "AM68A", {}),
    "probabilities times values on TDA4VM": (
        lambda: attention("uint8", "int8", "int8"),
        "TDA4VM",
        {"matmul-mixed-signs": "arm: TDA4VM does not multiply a signed by an unsigned activation"},
    ),
    "two signed ones make an unsigned one": (
        lambda: attention("int8", "int8", "uint8"),
        "AM68A",
        {"matmul-unsigned-output": "arm: both inputs are signed, the output is not"},
    ),
    "two unsigned ones make an unsigned one": (lambda: attention("uint8", "uint8", "uint8"), "TDA4VM", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_factors_and_signs_are_judged_by_the_table(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
