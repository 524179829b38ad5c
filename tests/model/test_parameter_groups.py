from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_qat
from hf_qat import QATConfig, calibrate, prepare_qat


def model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    return prepare_qat(net, QATConfig(scale_lr_multiplier=3.0), torch.randn(2, 3, 8, 8))


def test_weights_decay_norms_biases_scales_and_offsets_do_not_and_scales_have_a_rate_of_their_own():
    net = model()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    weights, vectors, scales = hf_qat.parameter_groups(net, lr=0.1, weight_decay=0.5)
    assert [names[id(p)] for p in weights["params"]] == ["0.weight", "4.weight"]
    assert [names[id(p)] for p in vectors["params"]] == ["0.bias", "1.weight", "1.bias", "4.bias"]
    assert {names[id(p)].rpartition(".")[2] for p in scales["params"]} == {"log2_scale", "offset"}
    assert sum(len(group["params"]) for group in (weights, vectors, scales)) == len(names)
    assert [(group["lr"], group["weight_decay"]) for group in (weights, vectors)] == [(0.1, 0.5), (0.1, 0.0)]
    assert scales["lr"] == pytest.approx(0.3) and scales["weight_decay"] == 0.0


def test_an_optimizer_over_the_groups_leaves_scales_that_get_no_gradient_where_they_are():
    net, x = model(), torch.randn(4, 3, 8, 8)
    calibrate(net, [x])
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD(hf_qat.parameter_groups(net, lr=0.1, weight_decay=0.5))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 0.95 if name in ("0.weight", "4.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_what_does_not_require_gradients_is_in_no_group_and_no_group_is_empty():
    net = nn.Linear(3, 2)
    net.weight.requires_grad_(False)
    [group] = hf_qat.parameter_groups(net, lr=0.1, weight_decay=0.5)
    assert [id(p) for p in group["params"]] == [id(net.bias)] and group["weight_decay"] == 0.0


def test_a_module_around_prepared_models_and_a_part_of_one_have_the_rates_of_their_recipes():
    x = torch.randn(2, 3, 8, 8)
    slow = prepare_qat(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()), QATConfig(scale_lr_multiplier=7.0), x)
    whole = nn.Sequential(nn.ModuleList([model(), slow]), nn.Linear(2, 2))
    rates = {
        id(parameter): group["lr"]
        for group in hf_qat.parameter_groups(whole, lr=0.1, weight_decay=0.5)
        for parameter in group["params"]
    }
    scales = [[rates[id(p)] for n, p in part.named_parameters() if n.endswith("log2_scale")] for part in whole[0]]
    assert [{round(rate, 6) for rate in of_part} for of_part in scales] == [{0.3}, {0.7}]
    assert len(rates) == sum(1 for _ in whole.parameters())
    *_, group = hf_qat.parameter_groups(whole[0][0][0], lr=0.1, weight_decay=0.5)
    assert group["lr"] == pytest.approx(0.3)


def test_a_scheduler_with_a_rate_for_each_group_keeps_their_ratio():
    optimizer = torch.optim.SGD(hf_qat.parameter_groups(model(), lr=0.1, weight_decay=0.5))
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=10)
    for _ in range(10):
        weights, _, scales = (group["lr"] for group in optimizer.param_groups)
        assert scales == pytest.approx(3 * weights)
        optimizer.step()
        if scheduler.last_epoch < 9:
            scheduler.step()
