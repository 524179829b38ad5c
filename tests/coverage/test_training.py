"""What is trained is the user's model: with gradients and randomness on, it equals the float model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.coverage.case import Case
from tests.coverage.models import CASES
from tests.coverage.training import EQUAL, parity_of


#: What every run tries; the others are slow together. LW-DETR's groups of queries are in `test_ways.py` too, and PVT
#: attends as Segformer does.
SAMPLE = (
    "BeitForImageClassification",
    "ConvNextForImageClassification",
    "MobileNetV2ForImageClassification",
    "SegformerForSemanticSegmentation",
    "SwinForImageClassification",
    "DetrForObjectDetection (auxiliary losses)",
)


def param(case: Case) -> Any:
    marks = [] if case.title in SAMPLE else [pytest.mark.slow]
    return pytest.param(case, id=f"{case.task}: {case.title}", marks=marks)


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_a_step_of_training_is_that_of_the_float_model(case):
    parity = parity_of(case)
    assert parity.outputs < EQUAL
    assert parity.gradients < EQUAL
    assert parity.buffers < EQUAL
