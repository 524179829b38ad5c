"""TI's rows of pooling, resizing and reductions."""

from __future__ import annotations

import pytest

from tests.tidl.layers import findings, from_text, one_layer
from tests.tidl.planted import IMAGE, ints, resize


VALIDATED = "TI has validated 3x3 and 1x1 with stride 1 or 2, and 2x2 with stride 2"


def pooled(kernel: int, stride: int, operator: str = "MaxPool", **more):
    return one_layer(operator, IMAGE, kernel_shape=[kernel] * 2, strides=[stride] * 2, **more)


#: Model, device, what is said of it.
CASES = {
    "3x3 with stride 1": (lambda: pooled(3, 1), "AM68A", {}),
    "2x2 with stride 2": (lambda: pooled(2, 2, "AveragePool"), "AM68A", {}),
    "2x2 with stride 1": (
        lambda: pooled(2, 1),
        "AM68A",
        {"pool-kernel": f"arm: kernel 2x2 with stride 1; {VALIDATED}"},
    ),
    "4x4 with stride 4": (
        lambda: pooled(4, 4, "AveragePool"),
        "AM68A",
        {"pool-kernel": f"arm: kernel 4x4 with stride 4; {VALIDATED}"},
    ),
    "1024 positions": (lambda: one_layer("GlobalAveragePool", [1, 8, 32, 32]), "AM68A", {}),
    "1056 positions": (
        lambda: one_layer("GlobalAveragePool", [1, 8, 33, 32]),
        "AM68A",
        {"global-pool-plane": "arm: it averages 1056 positions, of at most 1024"},
    ),
    "a volume": (
        lambda: one_layer("GlobalAveragePool", [1, 8, 2, 2, 2]),
        "AM68A",
        {"global-pool-dims": "arm: it averages over 3 axes"},
    ),
    "twice as large": (lambda: resize([1, 1, 2, 2]), "AM68A", {}),
    "three times as large": (lambda: resize([1, 1, 3, 3]), "AM68A", {"resize-factor": "arm: by 3"}),
    "taller": (lambda: resize([1, 1, 4, 2]), "AM68A", {"resize-factor": "arm: height by 4, width by 2"}),
    "half as large": (lambda: resize([1, 1, 0.5, 0.5]), "AM68A", {"resize-factor": "arm: it shrinks by 0.5"}),
    "nearest, rounded down": (
        lambda: resize([1, 1, 2, 2], "nearest", "asymmetric", nearest_mode="floor"),
        "AM68A",
        {},
    ),
    "nearest, rounded": (
        lambda: resize([1, 1, 2, 2], "nearest", "asymmetric", nearest_mode="round_prefer_floor"),
        "AM68A",
        {"resize-rounding": "arm: nearest_mode round_prefer_floor with asymmetric"},
    ),
    "corners on corners": (
        lambda: resize([1, 1, 2, 2], where="align_corners"),
        "AM68A",
        {"resize-coordinates": "arm: align_corners"},
    ),
    "the largest of each column": (lambda: one_layer("ReduceMax", IMAGE, axes=[2]), "AM68A", {}),
    "the largest of each row": (
        lambda: one_layer("ReduceMax", IMAGE, axes=[3]),
        "AM68A",
        {"reduce-axis": "arm: it reduces axes [3]"},
    ),
    "the best class": (lambda: one_layer("ArgMax", IMAGE, axis=-3), "AM68A", {}),
    "the best column": (lambda: one_layer("ArgMax", IMAGE, axis=-1), "AM68A", {"argmax-axis": "arm: axis -1"}),
    "the best two of a row": (lambda: one_layer("TopK", IMAGE, ints(2), outputs=2), "AM68A", {}),
    "the best two channels": (
        lambda: one_layer("TopK", IMAGE, ints(2), outputs=2, axis=1),
        "AM68A",
        {"topk-axis": "arm: axis 1"},
    ),
    "as many as is asked": (
        lambda: from_text("g (float[1, 8] x, int64[1] k) => (float[1, n] v, int64[1, n] i) { v, i = TopK(x, k) }"),
        "AM68A",
        {
            "shape-inference": "refused: 2 of 2 values have no shape, v the first",
            "topk-k": "arm: k is computed by the model",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_factors_and_axes_are_judged_by_the_table(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
