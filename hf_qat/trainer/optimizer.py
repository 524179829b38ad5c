"""Learned scales and offsets in the optimizer: a parameter group of their own."""

from __future__ import annotations

import torch
from torch import nn

from hf_qat.model.parameter_groups import scale_group


def count_missing(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> int:
    """How many of `parameters` the optimizer does not have."""
    present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return sum(id(parameter) not in present for parameter in parameters)


def move_scales_to_own_group(
    optimizer: torch.optim.Optimizer, scales: list[nn.Parameter], lr_multiplier: float
) -> None:
    """Move those of `scales` that the optimizer has into a new last group, in place, before its first step.

    It is `scale_group` at the learning rate of the first one; schedulers scale the rate that each group starts with.
    Groups that are left without parameters go: torch 2.13 gives the settings of an empty group to another one when it
    loads the state of a split optimizer.
    """
    wanted = {id(scale) for scale in scales}
    moved: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        moved += [parameter for parameter in group["params"] if id(parameter) in wanted]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
    if moved:
        group = scale_group(moved, optimizer.param_groups[0]["lr"], lr_multiplier)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group(group)
