from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.errors import StageError
from hf_qat.model.state import captured_children, require_stage, state_of
from tests.models import hand_written, made_once, resnet


@made_once
def prepared() -> nn.Module:
    return prepare_qat(hand_written(), QATConfig("w4a8"), torch.zeros(2, 3, 32, 32))


def converted() -> nn.Module:
    return convert(calibrate(prepared(), [torch.randn(2, 3, 32, 32)]))


def test_a_float_model_has_no_state():
    assert state_of(hand_written()) is None
    assert captured_children(hand_written()) == {}


def test_a_prepared_model_remembers_its_recipe_and_a_converted_one_still_does():
    for model in (prepared(), converted()):
        state = state_of(model)
        assert state is not None and state.config.target == "w4a8"


def test_the_parts_that_were_captured_are_the_models_own_in_the_order_of_their_call():
    model = prepare_qat(resnet(), QATConfig(), {"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert list(captured_children(model)) == ["resnet", "classifier"]
    assert captured_children(model)["resnet"] is model.resnet


@pytest.mark.parametrize(
    ("make", "stage", "message"),
    [
        (hand_written, "prepared", "cannot fly: HandWritten is a float model. Call prepare_qat(model, config) first."),
        (
            prepared,
            "converted",
            "cannot fly: the model is prepared already, not converted: call convert(model) first.",
        ),
        (converted, "prepared", "it is for inference only; prepare a copy"),
        (
            lambda: nn.DataParallel(prepared()),
            "prepared",
            "cannot fly: DataParallel is a module around HandWritten, which is prepared: pass its `module`.",
        ),
    ],
    ids=["float", "too early", "too late", "a wrapper"],
)
def test_a_call_at_the_wrong_stage_is_told_what_to_call(make, stage, message):
    with pytest.raises(StageError, match=re.escape(message)):
        require_stage(make(), stage, "fly")
