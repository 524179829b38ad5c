import pytest
import torch
from torch import nn

from hf_qat.model.parameter_groups import scale_parameters
from hf_qat.model.prepare import prepare_qat
from hf_qat.trainer.optimizer import count_missing, move_scales_to_own_group
from tests.models import hand_written
from tests.training import FOLLOWED, recipe


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))


def test_scales_are_the_parameters_that_preparing_has_added(model: nn.Module):
    added = {name for name, _ in model.named_parameters()} - {name for name, _ in hand_written().named_parameters()}
    assert {name.rpartition(".")[2] for name in added} == {"log2_scale", "offset"}
    parameters = dict(model.named_parameters())
    assert {id(parameter) for parameter in scale_parameters(model)} == {id(parameters[name]) for name in added}


def test_a_model_without_learned_scales_has_none():
    model = prepare_qat(hand_written(), recipe(**FOLLOWED), torch.randn(2, 3, 16, 16))
    assert scale_parameters(model) == []


def test_every_parameter_stays_in_exactly_one_group(model: nn.Module):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.3)
    scales = scale_parameters(model)
    move_scales_to_own_group(optimizer, scales, 10.0)
    weights, separated = optimizer.param_groups
    assert {id(p) for p in separated["params"]} == {id(p) for p in scales}
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert (weights["lr"], weights["weight_decay"]) == (0.5, 0.3)
    assert (separated["lr"], separated["weight_decay"]) == (5.0, 0.0)


def test_a_group_that_is_left_without_parameters_goes(model: nn.Module):
    scales = scale_parameters(model)
    optimizer = torch.optim.SGD([{"params": scales}, {"params": [torch.nn.Parameter(torch.ones(3))]}], lr=0.5)
    move_scales_to_own_group(optimizer, scales, 10.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, len(scales)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]


def test_one_step_of_sgd_moves_scales_by_the_multiplied_rate_without_decay(model: nn.Module):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.5)
    scale = scale_parameters(model)[0]
    move_scales_to_own_group(optimizer, scale_parameters(model), 10.0)
    before = scale.detach().clone()
    scale.grad = torch.ones_like(scale)
    optimizer.step()
    scale.grad = None
    torch.testing.assert_close(scale.detach(), before - 0.1)


def test_a_scheduler_scales_both_rates_alike(model: nn.Module):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    move_scales_to_own_group(optimizer, scale_parameters(model), 10.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]


def test_a_rate_that_the_optimizer_finds_itself_stays_open(model: nn.Module):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["lr"] = None
    move_scales_to_own_group(optimizer, scale_parameters(model), 10.0)
    assert optimizer.param_groups[1]["lr"] is None


def test_without_scales_nothing_changes():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    move_scales_to_own_group(optimizer, [], 10.0)
    assert len(optimizer.param_groups) == 1


def test_what_an_optimizer_lacks_is_counted(model: nn.Module):
    scales = scale_parameters(model)
    assert count_missing(torch.optim.SGD(model.parameters(), lr=1.0), scales) == 0
    assert count_missing(torch.optim.SGD([model.head.weight], lr=1.0), scales) == len(scales)
