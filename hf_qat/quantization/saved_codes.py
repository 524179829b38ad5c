"""What a quantizer puts out, kept for backward as less than itself.

A convolution keeps its input for the gradient of its weight, and its weight for that of its input. Where a quantizer
put these out, they need not be kept: the quantizer keeps its own input, and out of that they can be computed again, to
the last bit; or their integer codes say the same, a byte a value in place of four. A storage carries what was written
into it in that form, so that views are known by it, too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.transforms import transforms_functions


#: Attribute of a storage: its contents as `Codes`, a `KeptCopy`, or a weak reference to `Recomputed`.
_CONTENTS = "hf_qat_contents"

#: Codes that an int8 can tell apart.
BYTE = 256


class Kept(Enum):
    """What is kept of a quantized tensor for backward.

    Attributes:
        TENSORS: itself.
        INPUTS: what it was computed from, which its quantizer keeps anyway.
        CODES: its codes, and of what it was computed from a byte a value, too.
    """

    TENSORS = "tensors"
    INPUTS = "inputs"
    CODES = "codes"


class _Here(threading.local):
    """Of this thread: what `kept_for_backward` said, and what was computed inside it, if inputs are kept.

    Whatever operation keeps such a tensor holds on to it; what none has kept when the context ends is forgotten.

    Attributes:
        part: tells one context from the others. Outside, nothing is computed again: its parameters may not be there
            while another one is in its backward pass, as under FSDP.
    """

    kept = Kept.TENSORS
    part: object = None
    recomputed: list[Recomputed]

    def __init__(self) -> None:
        self.recomputed = []


_here = _Here()


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
    has_sum: ClassVar[bool] = False

    def keep(self) -> None:
        """Somebody will ask for it."""

    def values(self) -> Tensor:
        """The tensor, as it was."""
        if self.step.dim() == 0 and not isinstance(self.shift, Tensor) and compiles(self.step):
            from hf_qat.quantization.kernels.cpu.compact import expand

            return expand(self.codes, self.shift, self.step).to(self.dtype)
        integers = self.codes.float()
        if isinstance(self.shift, Tensor) or self.shift:
            integers.add_(self.shift)
        return integers.mul_(self.step).to(self.dtype)


class Recomputed:
    """A tensor as what it is computed from.

    Its value is there from the first time it is asked for in a backward pass to the last, as many as have kept it.

    Args:
        out: the tensor.
        function: makes it of `arguments` again.
        is_sum: of several such tensors.

    Attributes:
        has_sum: whether a sum is computed again on the way to it.
    """

    has_sum: bool

    def __init__(self, out: Tensor, function: Callable[..., Tensor], arguments: Sequence[Any], is_sum: bool) -> None:
        self.dtype, self.version = out.dtype, out._version
        self.function, self.arguments = function, list(map(as_kept, arguments))
        self.views = [argument for argument in self.arguments if type(argument) is KeptView]
        self.tensors = [argument for argument in self.arguments if isinstance(argument, Tensor)]
        self.versions = [tensor._version for tensor in self.tensors]
        self.has_sum = is_sum or any(view.base.has_sum for view in self.views)
        self.part = _here.part
        self.value: Tensor | None = None
        self.kept = self.taken = 0

    def keep(self) -> None:
        """Somebody will ask for it."""
        self.kept += 1
        if self.kept == 1:
            for view in self.views:
                view.base.keep()

    def values(self) -> Tensor:
        """The tensor, as it was."""
        value = self._compute() if self.value is None else self.value
        self.taken += 1
        if self.taken >= self.kept:
            self.taken, self.value = 0, None
        else:
            self.value = value
        return value

    def _compute(self) -> Tensor:
        if [tensor._version for tensor in self.tensors] != self.versions:
            raise RuntimeError(
                "what a quantizer needs to compute its gradient has been modified by an inplace operation since the "
                "forward pass: its input, or its scale. Call backward() before the optimizer's step."
            )
        arguments = map(_argument, self.arguments)
        if not torch.is_grad_enabled():  # as a rule, in backward
            return self.function(*arguments)
        with torch.no_grad():
            return self.function(*arguments)


class KeptView(NamedTuple):
    """A view of a tensor that is kept as something else."""

    base: Codes | Recomputed | KeptCopy
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        """The tensor, as it was."""
        whole = self.base.values()
        if whole.stride() == self.stride and whole.size() == self.size and self.offset == 0:
            return whole
        return whole.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class KeptCopy:
    """A contiguous copy of a view; `dtype` and `version` as of `Codes`."""

    view: KeptView
    dtype: torch.dtype
    version: int

    @property
    def has_sum(self) -> bool:
        """As of `Recomputed`."""
        return self.view.base.has_sum

    def keep(self) -> None:
        """Somebody will ask for it."""
        self.view.base.keep()

    def values(self) -> Tensor:
        """The tensor, as it was."""
        return self.view.values().contiguous()


def say_copied(x: Tensor, out: Tensor) -> None:
    """Say that `out`, if it is contiguous and in memory of its own, holds what `x` does."""
    if out.is_contiguous() and out.untyped_storage()._cdata != x.untyped_storage()._cdata:
        view = as_kept(x)
        if isinstance(view, KeptView):
            setattr(out.untyped_storage(), _CONTENTS, KeptCopy(view, out.dtype, out._version))


def keep_codes(out: Tensor, codes: Tensor, shift: float | Tensor, step: Tensor) -> None:
    """Say that `out`, a new tensor that fills its storage, is `(codes + shift) * step`; see `Codes`."""
    setattr(out.untyped_storage(), _CONTENTS, Codes(codes, shift, step, out.dtype, out._version))


def keep_inputs(out: Tensor, function: Callable[..., Tensor], *arguments: Any, is_sum: bool = False) -> Tensor:
    """`out`, of which is known from now on, where inputs are kept, that `function(*arguments)` makes it again.

    Args:
        out: a new tensor that fills its storage.
        function: is called without gradients.
        arguments: a tensor among them may not be written to before backward: `RuntimeError` then.
        is_sum: as of `Recomputed`.
    """
    return compute_again(out, function, *arguments, is_sum=is_sum) if keeps_inputs() else out


def compute_again(out: Tensor, function: Callable[..., Tensor], *arguments: Any, is_sum: bool = False) -> Tensor:
    """`keep_inputs`, where codes are kept, too."""
    if keeps_less():
        made = Recomputed(out, function, arguments, is_sum)
        _here.recomputed.append(made)
        setattr(out.untyped_storage(), _CONTENTS, weakref.ref(made))
    return out


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


def as_kept(tensor: Any) -> Any:
    """A tensor as a view of what is kept in its place, if anything; what is none, as it is."""
    found = getattr(tensor.untyped_storage(), _CONTENTS, None) if type(tensor) is Tensor else None
    if isinstance(found, weakref.ref):
        found = found()
        if found is not None and found.part is not _here.part:
            return tensor
    if found is None or found.version != tensor._version or found.dtype != tensor.dtype or tensor.is_neg():
        return tensor
    return KeptView(found, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _pack(tensor: Tensor) -> tuple[Tensor, int] | KeptView:
    packed = as_kept(tensor)
    if isinstance(packed, KeptView):
        packed.base.keep()
        return packed
    return tensor, tensor._version


def _unpack(packed: tuple[Tensor, int] | KeptView) -> Tensor:
    """As autograd does it of itself, which counts no versions of what goes through hooks."""
    if isinstance(packed, KeptView):
        return packed.values()
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            f"{tuple(tensor.shape)} tensor of {tensor.dtype} is at version {tensor._version}, expected version "
            f"{version}. It is a parameter, an input or an output of a prepared part: call backward() before it is "
            "written to, or write to a copy."
        )
    return tensor


def _argument(kept: Any) -> Any:
    return kept.values() if isinstance(kept, KeptView) else kept


@contextmanager
def kept_for_backward(kept: Kept) -> Iterator[None]:
    """Inside, what an operation keeps of a quantized tensor for backward is as `kept` says, if gradients are wanted.

    Not so under a compiler, which decides itself what to keep, nor inside the hooks of somebody else (gradient
    checkpointing and offloading have their own way with what is kept), nor under `torch.func`, whose tensors have no
    memory of their own.
    """
    nothing = kept is Kept.TENSORS or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if nothing or _others_hooks() or transforms_functions():
        yield
        return
    before = _here.kept, _here.part, _here.recomputed
    _here.kept, _here.part, _here.recomputed = kept, object(), []
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _here.kept, _here.part, _here.recomputed = before


def _others_hooks() -> bool:
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        return True
    hooks = autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0] is not _pack


def keeps_less() -> bool:
    """Whether quantized tensors are not kept as they are."""
    return not torch.compiler.is_compiling() and _here.kept is not Kept.TENSORS


def keeps_inputs() -> bool:
    """Whether what a quantizer puts out is computed again of what came in."""
    return not torch.compiler.is_compiling() and _here.kept is Kept.INPUTS


def keeps_codes() -> bool:
    """Whether a quantizer is to hand on the codes of what it puts out."""
    return not torch.compiler.is_compiling() and _here.kept is Kept.CODES
