"""Exchange a module's class, in place, for a subclass with a part of ours, as `torch.nn.utils.parametrize` does.

The module stays the same object with the same parameters, attributes and `isinstance` relations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn


Mixin = TypeVar("Mixin", bound=nn.Module)


#: Attribute of the classes that `class_with` has made.
_MARK = "_hf_qat_mixed"


@cache
def class_with(mixin: Any, original: Any, forward: Callable[..., Any] | None) -> Any:
    """A subclass of `mixin` and `original` under the name of `original`; with `forward`, if given."""
    body: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__, _MARK: True}
    if forward is not None:
        body["forward"] = forward
    return type(original.__name__, (mixin, original), body)


def swap_class(module: nn.Module, mixin: type[Mixin], forward: Callable[..., Any] | None = None) -> Mixin:
    """Mix `mixin` into the class of `module`, in place; its methods come before those of the original class.

    Args:
        module: any module.
        mixin: a subclass of `nn.Module` that adds no arguments to `__init__`.
        forward: replaces `forward` of both.

    Returns:
        The same object.
    """
    original: Any = type(module)
    part: Any = mixin
    module.__class__ = class_with(part, original, forward)
    assert isinstance(module, mixin)
    return module


def original_class(cls: type) -> type:
    """The original class of one that `class_with` has made."""
    original: type = cls.__bases__[1]
    return original


def rebased(cls: type, base: type) -> type:
    """`cls` with `base` in the place of the original class that everything was mixed into."""
    if _MARK not in cls.__dict__:
        return base
    mixed: type = class_with(cls.__bases__[0], rebased(original_class(cls), base), cls.__dict__.get("forward"))
    return mixed
