"""Capture on the meta device, before any weight is read, the very graph that was captured on real data."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


META = torch.device("meta")


class MetaCapture(TorchFunctionMode):
    """Inside, three things that need values do not fail, or lose them, for want of values.

    `bool(x)` is `False`: Hugging Face models ask `if mask.all()`, to leave out a mask that hides nothing, and do not
    ask while an exporter traces them, so that what was captured on real data contains the mask; `False` takes the same
    way. Where it does not, the captured operations differ from those that were saved, which is an error of its own.

    `torch._check_tensor_all` holds: deformable attention checks that its levels have as many places as its sequence.

    `torch.tensor(data, device=…)` keeps its data: it is made on the CPU, and becomes a constant of the graph there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and type(args[0]) is Tensor and args[0].device == META:
            return False
        if func is Tensor._is_all_true and args[0].device == META:
            return torch.ones((), dtype=torch.bool, device="cpu")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]) == META and not isinstance(args[0], Tensor):
                return func(*args, **{**kwargs, "device": "cpu"}).to(META)
        return func(*args, **kwargs)


def without_weights(model: nn.Module, keep_buffers: bool = False) -> nn.Module:
    """A copy on the meta device: it has the shapes of `model`, costs no memory, and computes nothing.

    Args:
        keep_buffers: copy these with their values.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(META), p.requires_grad) for p in model.parameters()}
    if not keep_buffers:
        memo |= {id(buffer): buffer.to(META) for buffer in model.buffers()}
    attributes = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    # A weight that a hook computes at each call, as pruning has it, is a result, which `deepcopy` refuses.
    memo |= {id(value): value.detach().to(META) for value in attributes if value.grad_fn is not None}
    return copy.deepcopy(model, memo)
