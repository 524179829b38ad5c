"""TI's rows of softmax, norms, and what is only taken as a part of something."""

from __future__ import annotations

import pytest

from tests.tidl.layers import findings, from_text, one_layer
from tests.tidl.planted import IMAGE, TOKENS, weights


NO_TABLE = "warning: AM62A has no look-up table for it: it is slow"

#: Model, device, what is said of it.
CASES = {
    "softmax over columns": (lambda: one_layer("Softmax", IMAGE, axis=-1), "AM68A", {}),
    "softmax over rows": (lambda: one_layer("Softmax", IMAGE, axis=2), "AM68A", {}),
    "softmax over channels": (
        lambda: one_layer("Softmax", IMAGE, axis=1),
        "AM68A",
        {"softmax-axis": "arm: along axis 1 of 4"},
    ),
    "softmax without a table": (lambda: one_layer("Softmax", IMAGE, axis=-1), "AM62A", {"no-lut": NO_TABLE}),
    "relu without a table": (lambda: one_layer("Relu", IMAGE), "AM62A", {}),
    "layer norm": (lambda: one_layer("LayerNormalization", TOKENS, weights(16), axis=2), "AM68A", {}),
    "layer norm over two axes": (
        lambda: one_layer("LayerNormalization", IMAGE, weights(16, 16), axis=2),
        "AM68A",
        {
            "layernorm-axis": "arm: over 2 axes",
            "layernorm-vectors": "arm: its scale has the shape [16, 16]",
        },
    ),
    "batch norm of five axes": (
        lambda: one_layer("BatchNormalization", [1, 8, 2, 2, 2], *[weights(8)] * 4),
        "AM68A",
        {},
    ),
    "instance norm of images": (lambda: one_layer("InstanceNormalization", IMAGE, *[weights(8)] * 2), "AM68A", {}),
    "instance norm of rows": (
        lambda: one_layer("InstanceNormalization", [1, 8], *[weights(8)] * 2),
        "AM68A",
        {"instancenorm-dims": "arm: its input has 2 axes"},
    ),
    "a mean of its own": (
        lambda: one_layer("ReduceMean", IMAGE, axes=[-1]),
        "AM68A",
        {"needs-newer-tools": "warning: tools 11.0 do not list ReduceMean outside a layer norm"},
    ),
    "the mean that is taken off": (
        lambda: from_text("g (float[1, 4] x) => (float[1, 4] z) { m = ReduceMean<axes=[-1]>(x) z = Sub(x, m) }"),
        "AM68A",
        {},
    ),
    "what does nothing": (
        lambda: one_layer("Identity", IMAGE),
        "AM68A",
        {"no-op": "arm: TIDL takes it only as a part of other layers"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_axes_and_patterns_are_judged_by_the_table(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
