"""What is trained is the user's model: with gradients and randomness on, it equals the float model."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hf_qat import QATConfig, prepare_qat
from tests.coverage.case import Case
from tests.coverage.models import CASES
from tests.coverage.training import compare_steps, noisy


#: Largest difference relative to the largest value of a tensor: weights of convolutions are folded in another order.
TOLERANCE = 2e-3


#: What every run tries; the others are slow together.
SAMPLE = (
    "BeitForImageClassification",
    "BitForImageClassification",
    "ConvNextForImageClassification",
    "MobileNetV2ForImageClassification",
    "PvtV2ForImageClassification",
    "SegformerForSemanticSegmentation",
    "SwinForImageClassification",
    "UperNetForSemanticSegmentation (ResNet)",
    "DetrForObjectDetection (auxiliary losses)",
    "LwDetrForObjectDetection",
)


#: Models whose training step differs from that of the float model.
OTHERS = ("PPDocLayoutV2Model",)


def param(case: Case) -> Any:
    marks = [] if case.title in SAMPLE else [pytest.mark.slow]
    if case.title in OTHERS:
        marks.append(pytest.mark.xfail(strict=True, reason="a gradient is another one; the cause is not found"))
    return pytest.param(case, id=f"{case.task}: {case.title}", marks=marks)


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_a_step_of_training_is_that_of_the_float_model(case):
    float_model = noisy(case)
    model = copy.deepcopy(float_model)
    prepare_qat(model, QATConfig(), case.labelled(2))
    parity = compare_steps(model, float_model, case.labelled(2, seed=7))
    assert parity.outputs < TOLERANCE
    assert parity.gradients < TOLERANCE
    assert parity.buffers < TOLERANCE
