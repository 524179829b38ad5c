"""TI's rows of operations on each number."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tidl.layers import findings, one_layer
from tests.tidl.planted import IMAGE, TOKENS, weights


#: Model, device, what is said of it.
CASES = {
    "a vector along channels": (lambda: one_layer("Mul", IMAGE, weights(8, 1, 1)), "AM68A", {}),
    "a vector along the width": (lambda: one_layer("Mul", IMAGE, weights(16)), "AM68A", {}),
    "a vector along the height": (
        lambda: one_layer("Mul", IMAGE, weights(16, 1)),
        "AM68A",
        {"eltwise-vector": "arm: a constant vector along axis -2"},
    ),
    "a whole tensor": (lambda: one_layer("Add", TOKENS, weights(1, 17, 16)), "AM68A", {}),
    "three at once": (
        lambda: one_layer("Max", IMAGE, weights(8, 1, 1), second=IMAGE),
        "AM68A",
        {"eltwise-inputs": "arm: it has 3 inputs"},
    ),
    "a difference of two activations": (
        lambda: one_layer("Sub", IMAGE, second=IMAGE),
        "AM68A",
        {"needs-newer-tools": "warning: tools 11.0 do not list a difference of two activations"},
    ),
    "one slope": (lambda: one_layer("PRelu", IMAGE, weights(1)), "AM68A", {}),
    "slopes along the width": (
        lambda: one_layer("PRelu", IMAGE, weights(16)),
        "AM68A",
        {"prelu-axis": "arm: slopes of the shape [16] for an input of [1, 8, 16, 16]"},
    ),
    "from -1 to 1": (lambda: one_layer("Clip", IMAGE, np.float32(-1), np.float32(1)), "AM68A", {}),
    "from 0 upwards": (lambda: one_layer("Clip", IMAGE, np.float32(0)), "AM68A", {}),
    "from below up to 0": (
        lambda: one_layer("Clip", IMAGE, np.float32(-1), np.float32(0)),
        "AM68A",
        {"clip-range": "arm: -1 to 0"},
    ),
    "a constant exponent": (lambda: one_layer("Pow", IMAGE, np.float32(2)), "AM68A", {}),
    "an exponent for each column": (
        lambda: one_layer("Pow", IMAGE, weights(16)),
        "AM68A",
        {"pow-exponent": "arm: its exponent is no single constant"},
    ),
    "a cast of an input": (lambda: one_layer("Cast", IMAGE, to=1, kind=2), "AM68A", {}),
    "bilinear samples": (lambda: one_layer("GridSample", IMAGE, weights(1, 4, 4, 2), mode="bilinear"), "AM68A", {}),
    "bicubic samples": (
        lambda: one_layer("GridSample", IMAGE, weights(1, 4, 4, 2), mode="bicubic"),
        "AM68A",
        {"gridsample-mode": "arm: mode bicubic"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operands_are_judged_by_the_table(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
