"""Exchange a module's class, in place, for a subclass with a part of ours, as `torch.nn.utils.parametrize` does.

The module stays the same object with the same parameters, attributes and `isinstance` relations. Its new class is made
at run time, so a pickle holds what it was made of.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import nn

from hf_qat.errors import CaptureError


Mixin = TypeVar("Mixin", bound=nn.Module)


#: Attribute of the classes that `class_with` has made.
_MARK = "_hf_qat_mixed"

#: Attribute of a `forward` that is made at run time: the function that made it, and what it was made for. A pickle
#: holds these two.
MADE_BY = "_hf_qat_made_by"


#: Names of a mixin that are meant to be those of the module, too.
SHARED = frozenset(dir(nn.Module)) | {"weight", "bias", "reset_running_stats"}


@dataclass(frozen=True)
class Parts:
    """What a class was made of: the arguments of `class_with`, with `forward` as its `MADE_BY` if it has one."""

    mixin: Any
    original: Any
    forward: Any


@cache
def class_with(mixin: Any, original: Any, forward: Callable[..., Any] | None) -> Any:
    """A subclass of `mixin` and `original` under the name of `original`; with `forward`, if given."""
    body: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__, _MARK: True}
    body["__reduce_ex__"] = _reduce
    if forward is not None:
        body["forward"] = forward
    return type(original.__name__, (mixin, original), body)


def _parts_of(cls: Any) -> Any:
    """The parts of a class that `class_with` has made, down to the original one; any other class is itself."""
    if _MARK not in cls.__dict__:
        return cls
    forward = cls.__dict__.get("forward")
    return Parts(cls.__bases__[0], _parts_of(original_class(cls)), getattr(forward, MADE_BY, forward))


def _class_of(parts: Any) -> Any:
    if not isinstance(parts, Parts):
        return parts
    forward = parts.forward
    if isinstance(forward, tuple):
        make, original = forward
        forward = make(original)
    return class_with(parts.mixin, _class_of(parts.original), forward)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """As the original class reduces itself, but with the parts of the class in its place."""
    cls: Any = type(self)
    while _MARK in cls.__dict__:
        cls = original_class(cls)
    make, arguments, *rest = cls.__reduce_ex__(self, max(protocol, 2))
    if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return make, arguments, *rest
    return _new, (_parts_of(arguments[0]), *arguments[1:]), *rest


def _new(parts: Any, *arguments: Any) -> Any:
    """An object without attributes: a pickle adds them."""
    cls = _class_of(parts)
    return cls.__new__(cls, *arguments)


def swap_class(module: nn.Module, mixin: type[Mixin], forward: Callable[..., Any] | None = None) -> Mixin:
    """Mix `mixin` into the class of `module`, in place; its methods come before those of the original class.

    Args:
        module: any module.
        mixin: a subclass of `nn.Module` that adds no arguments to `__init__`.
        forward: replaces `forward` of both; has `MADE_BY`, or can be pickled itself.

    Returns:
        The same object.
    """
    original: Any = type(module)
    part: Any = mixin
    module.__class__ = class_with(part, original, forward)
    assert isinstance(module, mixin)
    return module


def forget_own_forward(module: nn.Module) -> None:
    """Take from `module` a `forward` that was given to it alone, by a user or by accelerate's mixed precision.

    It would be called in the place of that of the class. A graph that was captured of it contains what it does.
    """
    for name in ("forward", "_original_forward"):
        vars(module).pop(name, None)


def require_free_names(module: nn.Module, mixin: type[nn.Module]) -> None:
    """The names that `mixin` gives to what it adds must not be names of the module's own.

    Raises:
        CaptureError: one is; with the names.
    """
    added = {name for cls in mixin.__mro__ if cls not in nn.Module.__mro__ for name in (*vars(cls), *_annotated(cls))}
    taken = sorted(name for name in added - SHARED if not name.startswith("__") and hasattr(module, name))
    if taken:
        raise CaptureError(
            f"{type(module).__name__} has attributes of its own called {', '.join(taken)}, which hf_qat needs for "
            "what it adds: rename them, or exclude the module"
        )


def _annotated(cls: type) -> set[str]:
    return set(cls.__dict__.get("__annotations__", ()))


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
