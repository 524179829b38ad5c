"""What TI's quantization document says of Q/DQ models: 8 bits, schemes by device."""

from __future__ import annotations

import pytest

from tests.tidl.layers import findings
from tests.tidl.planted import float_weights, four_bits, qdq


#: Model, device, what is said of it.
CASES = {
    "weights per channel": (lambda: qdq(), "AM68A", {}),
    "weights per channel on TDA4VM": (
        lambda: qdq(),
        "TDA4VM",
        {"scheme-per-channel": "refused: weights have one scale per channel"},
    ),
    "powers of two on TDA4VM": (lambda: qdq(weight_scales="one"), "TDA4VM", {}),
    "another scale on TDA4VM": (
        lambda: qdq(scale=0.3, weight_scales="one"),
        "TDA4VM",
        {"scheme-power-of-two": "refused: its scale 0.3 is no power of two"},
    ),
    "a zero point": (lambda: qdq(zero=3, input_zero=0), "AM68A", {}),
    "a zero point on TDA4VM": (
        lambda: qdq(zero=3, input_zero=0, weight_scales="one"),
        "TDA4VM",
        {"scheme-zero-point": "refused: its zero point is 3"},
    ),
    "16 bits": (lambda: qdq(kind="int16"), "AM68A", {"qdq-type": "refused: its codes are int16"}),
    "scales along input channels": (
        lambda: qdq(axis=1),
        "AM68A",
        {"scheme-weight-axis": "refused: its scales run along axis 1 of [4, 4, 1, 1]"},
    ),
    "a scale of 0": (lambda: qdq(scale=0.0), "AM68A", {"qdq-scale": "refused: a scale is not above 0"}),
    "float weights": (
        float_weights,
        "AM68A",
        {
            "no-range": "warning: its weights are float, though the rest of the model is quantized: TIDL has no range "
            "for it, and does not calibrate",
            "pair-missing": "warning: no Q/DQ pair follows it",
        },
    ),
    "4 bits": (
        four_bits,
        "AM68A",
        {"qdq-bits": "refused: its codes are clipped to -8 to 7: activations of fewer than 8 bits"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_types_scales_and_axes_are_judged_by_the_document(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
