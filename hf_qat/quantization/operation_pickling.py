"""Operations of `torch.ops` in pickles, by their names: layers and graphs hold them, and PyTorch pickles none."""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch._ops import OpOverload


def overload_named(name: str, overload: str) -> OpOverload:
    """`overload_named("aten::conv2d", "default")` → `torch.ops.aten.conv2d.default`."""
    namespace, _, operation = name.partition("::")
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    return found


def _by_name(operation: Any) -> tuple[Any, tuple[str, str]]:
    return overload_named, (operation._schema.name, operation._overloadname)


def register() -> None:
    """Make every `OpOverload` one that can be pickled."""
    copyreg.pickle(OpOverload, _by_name)
