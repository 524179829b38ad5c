"""Capture on the meta device, before any weight is read, the very graph that was captured on real data."""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


META = torch.device("meta")

#: Functions that take a single number from another device than their tensors', but not to the meta device.
FILLS = (Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill)


class MetaCapture(TorchFunctionMode):
    """Inside, five things that need values do not fail, or lose them, for want of values.

    `bool(x)` is `False`: Hugging Face models ask `if mask.all()`, to leave out a mask that hides nothing, and do not
    ask while an exporter traces them, so that what was captured on real data contains the mask; `False` takes the same
    way. Where it does not, the captured operations differ from those that were saved, which is an error of its own.

    `torch._check_tensor_all` holds: deformable attention checks that its levels have as many places as its sequence.

    `torch.tensor(data, device=…)` keeps its data: it is made on the CPU, and becomes a constant of the graph there.

    `masked_fill` takes a single number that was made on the CPU, as it does on every device but this.

    What is found by its value (key points above a threshold, patches that a mask hides) is a part of all places.

    Args:
        part: of each row, which is found: half of it, or 1 for all. Two runs with different ones show which sizes
            depend on values.
    """

    def __init__(self, part: float = 0.5) -> None:
        super().__init__()
        self.part = part

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and type(args[0]) is Tensor and args[0].device == META:
            return False
        if func is Tensor._is_all_true and args[0].device == META:
            return torch.ones((), dtype=torch.bool, device="cpu")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]) == META and not isinstance(args[0], Tensor):
                return func(*args, **{**kwargs, "device": "cpu"}).to(META)
        if func in FILLS and type(args[0]) is Tensor and args[0].device == META:
            return func(*(x.to(META) if isinstance(x, Tensor) else x for x in args), **kwargs)
        if func in FINDERS and type(args[0]) is Tensor and args[0].device == META:
            return FINDERS[func](self.part, *args, **kwargs)
        return func(*args, **kwargs)


def _places(part: float, x: Tensor) -> Tensor:
    """Stands for the places at which `x` is not 0: (number of places, axes)."""
    length = x.shape[-1] if x.dim() else 1
    rows = x.numel() // length if length else 0
    return torch.empty(rows * math.ceil(part * length), x.dim(), dtype=torch.long, device=META)


def _nonzero(part: float, x: Tensor, *, as_tuple: bool = False) -> Tensor | tuple[Tensor, ...]:
    return _places(part, x).unbind(1) if as_tuple else _places(part, x)


def _where(part: float, condition: Tensor, *values: Any, **named: Any) -> Any:
    """`torch.where(condition)` finds places; with values it selects."""
    return torch.where(condition, *values, **named) if values or named else _nonzero(part, condition, as_tuple=True)


def _selected(part: float, x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(len(_places(part, mask.expand(torch.broadcast_shapes(x.shape, mask.shape)))))


def _indexed(part: float, x: Tensor, index: Any) -> Tensor:
    """`x[index]` with places in the stead of the masks in it."""
    entries = index if isinstance(index, tuple) else (index,)
    if not any(_is_mask(entry) for entry in entries):
        return x[index]
    parts = [_places(part, entry).unbind(1) if _is_mask(entry) else (entry,) for entry in entries]
    return x[tuple(chain.from_iterable(parts))]


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.device == META


#: The functions whose sizes depend on values → what makes a part of all places of them.
FINDERS: dict[Any, Any] = {
    torch.nonzero: _nonzero,
    Tensor.nonzero: _nonzero,
    torch.argwhere: _places,
    Tensor.argwhere: _places,
    torch.where: _where,
    torch.masked_select: _selected,
    Tensor.masked_select: _selected,
    Tensor.__getitem__: _indexed,
}


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
