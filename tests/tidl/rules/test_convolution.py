"""TI's rows Conv, ConvTranspose and DeformConv: the last size that is listed, and the first that is not."""

from __future__ import annotations

import pytest

from tests.tidl.layers import findings, one_layer
from tests.tidl.planted import IMAGE, conv, weights


def transposed(kernel: int, stride: int = 2, **more):
    return one_layer("ConvTranspose", IMAGE, weights(8, 8, kernel, kernel), strides=[stride] * 2, **more)


#: Model, device, what is said of it.
CASES = {
    "7x7 with stride 2": (lambda: conv(7, 2, 3), "AM68A", {}),
    "8x8 with stride 2": (lambda: conv(8, 2, 4), "AM68A", {"conv-kernel": "arm: kernel 8x8 with stride 2"}),
    "9x9 with stride 1": (lambda: conv(9, 1, 4), "AM68A", {}),
    "11x11 with stride 4": (lambda: conv(11, 4, 5), "AM68A", {}),
    "5x5 with stride 4": (lambda: conv(5, 4, 2), "AM68A", {"conv-stride-4": "arm: kernel 5x5 with stride 4"}),
    "7x7 with stride 4": (
        lambda: conv(7, 4, 3),
        "AM68A",
        {
            "conv-stride-4": "warning: 7x7 with stride 4 is not in TI's table of operators, but SegFormer, which "
            "starts so, is in its list of transformers"
        },
    ),
    "two strides": (
        lambda: one_layer("Conv", IMAGE, weights(8, 8, 3, 3), strides=[2, 1]),
        "AM68A",
        {"conv-stride": "arm: its strides differ: 2 and 1"},
    ),
    "3x3 with stride 3": (lambda: conv(3, 3), "AM68A", {}),
    "3x3 with stride 3 on AM62A": (
        lambda: conv(3, 3),
        "AM62A",
        {"conv-3x3-stride-3": "arm: AM62A does not take 3x3 with stride 3"},
    ),
    "depthwise 7x7 with stride 2": (lambda: conv(7, 2, 3, group=8), "AM68A", {}),
    "depthwise 5x5 with stride 1": (
        lambda: conv(5, 1, 2, group=8),
        "AM68A",
        {"needs-newer-tools": "warning: tools 11.0 do not list depthwise 5x5 with stride 1"},
    ),
    "depthwise 2x2": (
        lambda: conv(2, 1, 0, group=8),
        "AM68A",
        {"conv-depthwise": "arm: depthwise 2x2 with stride 1"},
    ),
    "padding as wide as the input": (lambda: conv(7, 1, 3, shape=[1, 8, 3, 3]), "AM67A", {}),
    "padding wider than the input": (
        lambda: conv(9, 1, 4, shape=[1, 8, 3, 3]),
        "AM67A",
        {"conv-padding": "arm: it pads 4 columns onto an input 3 wide"},
    ),
    "wider than the input on AM68A": (lambda: conv(9, 1, 4, shape=[1, 8, 3, 3]), "AM68A", {}),
    "transposed 4x4": (lambda: transposed(4), "AM68A", {}),
    "transposed 3x3": (
        lambda: transposed(3),
        "AM68A",
        {"needs-newer-tools": "warning: tools 11.0 do not list a transposed convolution of 3x3 with stride 2"},
    ),
    "transposed with stride 1": (
        lambda: transposed(2, 1),
        "AM68A",
        {"transposed-kernel": "arm: kernel 2x2 with stride 1"},
    ),
    "deformable 3x3": (
        lambda: one_layer("DeformConv", IMAGE, weights(8, 8, 3, 3), weights(1, 18, 14, 14), opset=19),
        "AM68A",
        {},
    ),
    "deformable 1x1": (
        lambda: one_layer("DeformConv", IMAGE, weights(8, 8, 1, 1), weights(1, 2, 16, 16), opset=19),
        "AM68A",
        {"deform-kernel": "arm: kernel 1x1 with stride 1"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_strides_and_pads_are_judged_by_the_table(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
