import math
from functools import cache

import pytest

from tests.coverage.case import Case
from tests.coverage.chain import OPSET, Row, run
from tests.coverage.models import CASES


#: Parity of the prepared model with its quantizers off: batch norms are folded, which changes the order of sums. Where
#: the last digit of the input changes the float model's outputs (detectors select), so often as much.
PREPARED, DIGITS = 1e-4, 10

#: Relative RMS between ONNX Runtime and the converted model.
RMS = 0.05


#: Models whose weights the graph computes (standardises), so that they are quantized like activations.
STANDARDIZED = ": Bit"


#: Families that are convolutions throughout: there, nothing between input and logits may stay float.
CONVOLUTIONAL = ("Bit", "ConvNext", "EfficientNet", "HGNet", "MobileNet", "PPLCNet", "RegNet", "ResNet", "TextNet")


#: What every run tries, beside the ResNet and the ViT of all other tests; the others are slow together.
SAMPLE = (
    "ConvNextForImageClassification",
    "EfficientNetForImageClassification",
    "CLIPVisionModel",
    "YolosForObjectDetection",
)


@cache
def row_of(title: str) -> Row:
    case = next(case for case in CASES if f"{case.task}: {case.title}" == title)
    return run(case, exported=not case.not_exported and not case.heavy)


def param(case: Case) -> object:
    marks = [] if case.title in SAMPLE else [pytest.mark.slow]
    return pytest.param(f"{case.task}: {case.title}", id=case.title.replace(" ", "-"), marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", [param(case) for case in CASES])
def test_a_model_goes_from_float_to_int8_and_computes_there_what_it_learned(title):
    row = row_of(title)
    assert not row.refusal
    assert row.captured and row.quantizers
    assert row.layers or STANDARDIZED in title
    assert row.capture_difference == 0.0 and row.loss_difference == 0.0
    assert not row.unloaded
    assert row.prepared_difference <= max(PREPARED, DIGITS * row.precision)
    assert len(row.losses) == 2 and all(map(math.isfinite, row.losses))
    assert not row.missing_gradients
    assert not row.batch_norms
    assert all(reason != "no rule" for _, _, reason in row.float_operations)
    if title.partition(": ")[2].startswith(CONVOLUTIONAL):
        assert not row.float_operations
    if row.opset:
        assert row.opset == OPSET
        assert row.float_batch_norms == 0
        assert row.rms <= max(RMS, 2 * row.sensitivity)
