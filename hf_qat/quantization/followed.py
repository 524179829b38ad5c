"""Operations between quantizers that hand on what is known of their inputs, in place of PyTorch's own in a graph.

What rearranges a tensor in new memory holds what it held before, and so do the copies that a product makes out of
sight. What an operation that keeps its own input computes of a quantized tensor can be computed again in backward:
then neither need be kept (`hf_qat.quantization.saved_codes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.bound_functions import BOUND
from hf_qat.quantization.saved_codes import KeptView, as_kept, keep_inputs, keeps_inputs, keeps_less, say_copied


aten = torch.ops.aten


def _copied(operation: Callable[..., Tensor], x: Tensor, arguments: Any, options: Any) -> Tensor:
    out = operation(x, *arguments, **options)
    if keeps_less():
        say_copied(x, out)
    return out


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.matmul(*(_batches(a, b) if keeps_less() else (a, b)))
    return product


def _batches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a product of matrices; where it would copy them to lay them out one after the other, the copies.

    It would with two batch axes of which the first is not just further apart than the second.
    """
    if a.dim() < 4 or a.shape[:-2] != b.shape[:-2]:
        return a, b
    return _batch(a), _batch(b)


def _batch(x: Tensor) -> Tensor:
    out = x.reshape(-1, *x.shape[-2:])
    say_copied(x, out)
    return out.view(x.shape) if out.is_contiguous() else x


def _computed_again(operation: Callable[..., Tensor], x: Tensor, arguments: Any, options: Any) -> Tensor:
    out = operation(x, *arguments, **options)
    if _is_known(x):
        keep_inputs(out, _Again(operation, options, x.device.type), x, *arguments)
    return out


def _add(a: Tensor, b: Any, **options: Any) -> Tensor:
    """Of sums that follow each other every second one is computed again: all would be, of the first of them."""
    out: Tensor = torch.add(a, b, **options)
    if keeps_inputs() and not options:
        kept = as_kept(a), as_kept(b)
        if all(isinstance(view, KeptView) and not view.base.has_sum for view in kept):
            keep_inputs(out, _Again(torch.add, options, a.device.type), a, b, is_sum=True)
    return out


def _is_known(x: Tensor) -> bool:
    """Whether it need not be kept for what is computed of it."""
    return keeps_inputs() and isinstance(as_kept(x), KeptView)


class _Again:
    """Calls an operation under the autocast of now."""

    def __init__(self, operation: Callable[..., Tensor], options: dict[str, Any], device: str) -> None:
        self.operation, self.options = operation, options
        self.device, self.autocast = device, _autocast_of(device)

    def __call__(self, *arguments: Any) -> Tensor:
        if _autocast_of(self.device) == self.autocast:  # as a rule; to set it takes as long as the operation
            return self.operation(*arguments, **self.options)
        enabled, dtype = self.autocast
        with torch.autocast(self.device, dtype, enabled):
            return self.operation(*arguments, **self.options)


def _autocast_of(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    out: Tensor = _Softmax.apply(x, dim, dtype) if _is_known(x) else torch.softmax(x, dim, dtype)
    return out


class _Softmax(torch.autograd.Function):
    """Keeps what it puts out, as PyTorch's, which looks at it before anybody can say what it is computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        again = _Again(torch.softmax, {}, x.device.type)
        out = keep_inputs(torch.softmax(x, dim, dtype), again, x, dim, dtype)
        ctx.save_for_backward(out)
        ctx.dim, ctx.dtype = dim, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        dx = aten._softmax_backward_data(grad, out, ctx.dim, out.dtype)
        return dx.to(ctx.dtype), None, None


def _calling(how: Callable[..., Tensor], operation: Any) -> Callable[..., Tensor]:
    called = BOUND.get(operation, operation)

    def followed(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return how(called, x, arguments, options)

    followed.__name__ = f"followed_{operation.overloadpacket.__name__}"  # stands in the code of the graph
    return followed


COPIES = (aten.contiguous.default, aten.reshape.default)

#: They take little time for what they save, and keep their input for backward, not what they put out.
CHEAP = (aten.gelu.default, aten.hardswish.default, aten.layer_norm.default, aten.silu.default)

#: Operation of a graph → what its Python function calls.
FOLLOWED: dict[Any, Callable[..., Tensor]] = {
    **BOUND,
    **{operation: _calling(_copied, operation) for operation in COPIES},
    **{operation: _calling(_computed_again, operation) for operation in CHEAP},
    aten.add.Tensor: _add,
    aten.matmul.default: _matmul,
    aten.softmax.int: _softmax,
}
