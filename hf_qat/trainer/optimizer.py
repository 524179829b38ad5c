"""Learned scales and offsets in the optimizer: a parameter group of their own."""

from __future__ import annotations

import torch
from torch import nn

from hf_qat.quantization.quantizer import fake_quantizers


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All learned scales and offsets of a prepared model."""
    return [parameter for quantizer in fake_quantizers(model).values() for parameter in quantizer.parameters()]


def count_missing(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> int:
    """How many of `parameters` the optimizer does not have."""
    present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return sum(id(parameter) not in present for parameter in parameters)


def move_scales_to_own_group(
    optimizer: torch.optim.Optimizer, scales: list[nn.Parameter], lr_multiplier: float
) -> None:
    """Move those of `scales` that the optimizer has into a new last group, in place, before its first step.

    The group has no weight decay, and `lr_multiplier` times the learning rate of the first one; schedulers scale the
    rate that each group starts with. Groups that are left without parameters go: torch 2.13 gives the settings of an
    empty group to another one when it loads the state of a split optimizer.
    """
    wanted = {id(scale) for scale in scales}
    moved: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        moved += [parameter for parameter in group["params"] if id(parameter) in wanted]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
    if moved:
        rate = optimizer.param_groups[0]["lr"]
        # Some optimizers find their own rate, and have `None` here.
        rate = None if rate is None else rate * lr_multiplier
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group({"params": moved, "weight_decay": 0.0, "lr": rate})
