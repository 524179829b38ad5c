"""Change the mode of a model, or how its parts follow it, for a while, or run it; then all is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from hf_qat.graph.captured import FOLLOW_THEIR_MODE


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modes may change; a part that its owner had in another mode than the rest gets it back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def ready_for_capture(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation, and put into training it does nothing that a graph cannot."""
    with frozen_parts_kept(model), batch_norms_of_one_process(model), averages_left_alone(model), evaluating(model):
        yield


def put_into_mode(module: nn.Module, training: bool) -> None:
    """Put a module into a mode, from training: what it keeps for evaluation only, it computes anew.

    LeViT keeps biases that depend on parameters; it drops them when it is put into training. A module that is itself
    frozen is put into the mode nevertheless: which of its graphs it runs, it decides by its mode.
    """
    for mode in (True, training):
        type(module).train(module, mode)


@contextmanager
def frozen_parts_kept(model: nn.Module) -> Iterator[None]:
    """Inside, `train()` leaves alone what is in evaluation although `model` is in training: a frozen part."""
    inside = {m for module in model.modules() if not module.training for m in module.modules() if m is not module}
    frozen = [m for m in model.modules() if model.training and not m.training and m not in inside]
    with shadowed("train", {module: MethodType(_train_batch_norms, module) for module in frozen}):
        yield


def _train_batch_norms(module: nn.Module, mode: bool = True) -> nn.Module:
    """Batch norms look at their own mode after capture, too, so they are captured as ones that train."""
    for inner in module.modules():
        inner.training = mode and isinstance(inner, FOLLOW_THEIR_MODE)
    return module


@contextmanager
def batch_norms_of_one_process(model: nn.Module) -> Iterator[None]:
    """Inside, a `SyncBatchNorm` normalises by the batch of its own process: a graph cannot wait for others."""
    synchronized = [m for m in model.modules() if type(m).forward is nn.SyncBatchNorm.forward]
    forward = nn.modules.batchnorm._BatchNorm.forward
    with shadowed("forward", {module: MethodType(forward, module) for module in synchronized}):
        yield


@contextmanager
def averages_left_alone(model: nn.Module) -> Iterator[None]:
    """Inside, a batch norm without momentum, which averages over all batches, does not move its running statistics.

    It reads how many batches there were, which no graph can; the layer that takes its place in the graph does.
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    averaging = [(norm, norm.num_batches_tracked) for norm in norms if norm.momentum is None]
    for norm, _ in averaging:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, count in averaging:
            norm.num_batches_tracked = count


@contextmanager
def shadowed(name: str, functions: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Inside, modules have these functions for a method `name`; one that a user gave to a module comes back."""
    own = {module: vars(module)[name] for module in functions if name in vars(module)}
    for module, function in functions.items():
        vars(module)[name] = function
    try:
        yield
    finally:
        for module in functions:
            del vars(module)[name]
        for module, function in own.items():
            vars(module)[name] = function


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Inside, `model` may write to its buffers; it gets their values back."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
