from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_qat.errors import NonFiniteError
from hf_qat.model.finite import require_finite


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"])
def test_the_tensor_that_is_not_finite_is_named(name):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    require_finite(model, "go on")
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = float("nan")
    with pytest.raises(NonFiniteError, match=f"cannot go on: {name} of Sequential holds NaN"):
        require_finite(model, "go on")


def test_a_mask_of_infinities_and_weights_that_are_not_there_yet_pass():
    model = nn.Linear(2, 3)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    require_finite(model, "go on")
    require_finite(model.to("meta"), "go on")


def test_numbers_whose_sum_overflows_are_finite_and_infinities_of_both_signs_are_not():
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, 3e38)
    require_finite(model, "go on")
    with torch.no_grad():
        model.weight[0, 0], model.weight[0, 1] = torch.inf, -torch.inf
    with pytest.raises(NonFiniteError, match=r"weight of Linear holds infinity"):
        require_finite(model, "go on")
