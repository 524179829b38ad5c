"""What a quantizer puts out, kept for backward as integer codes: one byte a value, in place of four.

A convolution keeps its input for the gradient of its weight, and its weight for that of its input. Where a quantizer
put these out, their codes say the same to the last bit. A storage carries the codes of what was written into it, so
that views are known by them, too, and they are gone when it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode


#: Attribute of a storage: the `Codes` of its contents.
_CODES = "hf_qat_codes"

#: Codes that an int8 can tell apart.
BYTE = 256


class _Active(threading.local):
    """Whether this thread is inside `codes_for_backward`."""

    active = False


_here = _Active()


@dataclass(frozen=True)
class Codes:
    """A tensor as `(codes + shift) * step`.

    Attributes:
        codes: int8, laid out in memory as the tensor.
        shift: a number, or () where reading it would wait for a GPU.
        step: float32, broadcasts with `codes`.
        dtype: of the tensor.
        version: of the tensor when this was true of it.
    """

    codes: Tensor
    shift: float | Tensor
    step: Tensor
    dtype: torch.dtype
    version: int

    def values(self) -> Tensor:
        """The tensor, as it was."""
        integers = self.codes.float()
        if isinstance(self.shift, Tensor) or self.shift:
            integers.add_(self.shift)
        return integers.mul_(self.step).to(self.dtype)


@dataclass(frozen=True)
class _View:
    """Of a tensor that has codes."""

    base: Codes | _Copy
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.base.values().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Copy:
    """A contiguous copy of a view; `dtype` and `version` as of `Codes`."""

    view: _View
    dtype: torch.dtype
    version: int

    def values(self) -> Tensor:
        return self.view.values().contiguous()


def keep_codes(out: Tensor, codes: Tensor, shift: float | Tensor, step: Tensor) -> None:
    """Say that `out`, a new tensor that fills its storage, is `(codes + shift) * step`; see `Codes`."""
    setattr(out.untyped_storage(), _CODES, Codes(codes, shift, step, out.dtype, out._version))


def fits_byte(qmin: int, qmax: int) -> bool:
    """Whether these codes are int8 as they are."""
    return -BYTE // 2 <= qmin and qmax < BYTE // 2


def byte_shift(low: float | Tensor, span: int) -> float | Tensor:
    """What codes of which the lowest is `low`, and the highest `span` above it, are moved by into an int8."""
    return low + (span + 1) // 2


def to_byte(integers: Tensor, shift: float | Tensor) -> Tensor:
    """int8, whole numbers less `shift`."""
    moved = isinstance(shift, Tensor) or shift != 0
    return (torch.sub(integers, shift) if moved else integers).to(torch.int8)


@torch.no_grad()
def keep_codes_found(out: Tensor, step: Tensor, low: float | Tensor, span: int) -> None:
    """`keep_codes` of what is quantized already: whole multiples of `step`, the lowest of them `low`."""
    shift = byte_shift(low, span)
    keep_codes(out, to_byte(torch.div(out.float(), step).round_(), shift), shift, step)


def _pack(tensor: Tensor) -> Tensor | _View:
    found: Codes | _Copy | None = getattr(tensor.untyped_storage(), _CODES, None) if type(tensor) is Tensor else None
    if found is None or found.version != tensor._version or found.dtype != tensor.dtype:
        return tensor
    return _View(found, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class _FollowCopies(TorchFunctionMode):
    """What rearranges a tensor in new memory hands on its codes; so does a product, which does it out of sight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.matmul.default:
            return func(*_batches(*args))
        out = func(*args, **(kwargs or {}))
        if func in COPIES:
            _follow(args[0], out)
        return out


#: What copies a tensor into contiguous memory, if it is not there.
COPIES = frozenset({torch.ops.aten.contiguous.default, torch.ops.aten.reshape.default})


def _follow(x: Tensor, out: Tensor) -> None:
    if out.is_contiguous() and out.untyped_storage()._cdata != x.untyped_storage()._cdata:
        view = _pack(x)
        if isinstance(view, _View):
            setattr(out.untyped_storage(), _CODES, _Copy(view, out.dtype, out._version))


def _batches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a product of matrices; where it would copy them to lay them out one after the other, the copies.

    It would with two batch axes of which the first is not just further apart than the second.
    """
    if a.dim() < 4 or a.shape[:-2] != b.shape[:-2]:
        return a, b
    return _batch(a), _batch(b)


def _batch(x: Tensor) -> Tensor:
    out = x.reshape(-1, *x.shape[-2:])
    _follow(x, out)
    return out.view(x.shape) if out.is_contiguous() else x


def _unpack(packed: Tensor | _View) -> Tensor:
    return packed.values() if isinstance(packed, _View) else packed


@contextmanager
def codes_for_backward(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, whatever operation keeps a quantized tensor for backward keeps its codes.

    Not so under a compiler, which decides itself what to keep, nor inside the hooks of somebody else: gradient
    checkpointing and offloading have their own way with what is kept.
    """
    if not wanted or torch.compiler.is_compiling() or not torch.is_grad_enabled() or _others_hooks():
        yield
        return
    before, _here.active = _here.active, True
    try:
        with saved_tensors_hooks(_pack, _unpack), _FollowCopies():
            yield
    finally:
        _here.active = before


def _others_hooks() -> bool:
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0] is not _pack


def keeps_codes() -> bool:
    """Whether a quantizer is to hand on the codes of what it puts out."""
    return not torch.compiler.is_compiling() and _here.active
