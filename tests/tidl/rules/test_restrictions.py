"""TI's table of layer restrictions: what each deviation is told, word for word."""

from __future__ import annotations

import pytest

from tests.tidl.layers import findings
from tests.tidl.planted import quantized, silu, transposed_per_channel


#: Model, device, what is said of it.
CASES = {
    "an asymmetric input": (
        lambda: quantized("Softmax", input_zero=7),
        "AM68A",
        {"asymmetric-input": "warning: the quantizer of input x has the zero point 7"},
    ),
    "an asymmetric input of a device without zero points": (
        lambda: quantized("Softmax", input_zero=7, zero=0),
        "TDA4VM",
        {"scheme-zero-point": "refused: its zero point is 7"},
    ),
    "an asymmetric sigmoid": (
        lambda: quantized("Sigmoid", zero=3),
        "AM68A",
        {"asymmetric-layer": "warning: it takes no zero point, and its output has the zero point 3"},
    ),
    "an asymmetric softmax": (lambda: quantized("Softmax", zero=3), "AM68A", {}),
    "an asymmetric product": (
        lambda: quantized("MatMul", zero=3, more=", d"),
        "AM68A",
        {"asymmetric-product": "warning: it multiplies two activations, and its output has the zero point 3"},
    ),
    "transposed weights per channel": (
        transposed_per_channel,
        "AM68A",
        {"per-channel-weights": "warning: its weights have one scale per channel"},
    ),
    "pooling without a pair": (
        lambda: quantized("MaxPool", attributes="<kernel_shape = [1, 1]>", last=False, zero=0),
        "AM68A",
        {
            "no-op": "arm: TIDL takes it only as a part of other layers",
            "pair-missing": "warning: no Q/DQ pair follows it",
        },
    ),
    "a reshape without a pair": (
        lambda: quantized("Transpose", attributes="<perm = [0, 1, 2, 3]>", last=False, zero=0),
        "AM68A",
        {"no-op": "arm: TIDL takes it only as a part of other layers"},
    ),
    "SiLU": (lambda: silu(), "AM68A", {}),
    "a pair inside SiLU": (
        lambda: silu(inside=True),
        "AM68A",
        {"pair-inside": "warning: it stands inside SiLU, which TIDL takes for one layer"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_deviation_is_named_in_these_words(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
