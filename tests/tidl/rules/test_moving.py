"""TI's rows of layers that only move numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tidl.layers import findings, from_text, one_layer
from tests.tidl.planted import IMAGE, TOKENS, ints


#: Model, device, what is said of it.
CASES = {
    "joined channels": (lambda: one_layer("Concat", IMAGE, second=IMAGE, axis=-3), "AM68A", {}),
    "joined images": (
        lambda: one_layer("Concat", IMAGE, second=IMAGE, axis=0),
        "AM68A",
        {"concat-axis": "arm: along axis 0 of 4"},
    ),
    "every second row": (
        lambda: one_layer("Slice", IMAGE, ints(0), ints(16), ints(2), ints(2)),
        "AM68A",
        {"slice-step": "arm: step 2"},
    ),
    "a slice of three axes": (
        lambda: one_layer("Slice", TOKENS, ints(0), ints(4), ints(1)),
        "AM68A",
        {"slice-dims": "arm: its input has 3 axes"},
    ),
    "a split of channels": (lambda: one_layer("Split", IMAGE, ints(4, 4), outputs=2, axis=1), "AM68A", {}),
    "a split of images": (
        lambda: one_layer("Split", [2, 8, 16, 16], ints(1, 1), outputs=2, axis=0),
        "AM68A",
        {
            "batch": "warning: input x takes 2 images at once",
            "slice-batch": "arm: the batch is 2",
            "slice-batch-axis": "arm: it slices the batch",
        },
    ),
    "rows by a vector": (lambda: one_layer("Gather", TOKENS, ints(0, 2), axis=1), "AM68A", {}),
    "a row by a number": (
        lambda: one_layer("Gather", TOKENS, np.array(0), axis=1),
        "AM68A",
        {"gather-indices": "arm: its indices have 0 axes"},
    ),
    "columns": (
        lambda: one_layer("Gather", TOKENS, ints(0), axis=-1),
        "AM68A",
        {"gather-axis": "arm: axis -1 of [1, 17, 16]: sizes before the axis are above 1"},
    ),
    "six axes": (lambda: one_layer("Unsqueeze", [1, 2, 3, 2, 2], ints(0)), "AM68A", {}),
    "seven axes": (
        lambda: one_layer("Unsqueeze", [1, 2, 3, 1, 2, 2], ints(0)),
        "AM68A",
        {"unsqueeze-dims": "arm: its output has 7 axes, of at most 6"},
    ),
    "the width of four axes to the front": (lambda: one_layer("Transpose", IMAGE, perm=[3, 0, 1, 2]), "AM68A", {}),
    "the width of five axes to the front": (
        lambda: one_layer("Transpose", [1, 2, 3, 4, 5], perm=[0, 4, 1, 2, 3]),
        "AM68A",
        {"transpose-width": "arm: of 5 axes, it moves the last one to place 1"},
    ),
    "zeros around the image": (lambda: one_layer("Pad", IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 4)), "AM68A", {}),
    "zeros after the channels": (
        lambda: one_layer("Pad", IMAGE, ints(0, 0, 0, 0, 0, 1, 0, 0)),
        "AM68A",
        {"pad-axes": "arm: it pads channels or the batch"},
    ),
    "a mirrored edge": (
        lambda: one_layer("Pad", IMAGE, ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
        "AM68A",
        {"pad-mode": "arm: mode reflect"},
    ),
    "blocks that fit": (lambda: one_layer("SpaceToDepth", IMAGE, blocksize=4), "AM68A", {}),
    "blocks that do not": (
        lambda: one_layer("DepthToSpace", [1, 6, 4, 4], blocksize=2, infer=False),
        "AM68A",
        {
            "shape-inference": "refused: 1 of 1 values have no shape, out0 the first",
            "space-block": "arm: [1, 6, 4, 4] is no multiple of the block 2",
        },
    ),
    "a shape from elsewhere": (
        lambda: from_text("g (float[1, 8] x, int64[2] s) => (float[2, 4] z) { z = Reshape(x, s) }"),
        "AM68A",
        {"reshape-variable": "arm: its shape is computed"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_axes_limits_and_sizes_are_judged_by_the_table(case, saved):
    make, device, expected = CASES[case]
    assert findings(saved(make()), device) == expected
