"""Transforms of functions that rounding does not follow: those of `torch.func`, and derivatives in forward mode.

Kernels look at plain memory, and gradients are straight-through: a transform would fail somewhere inside, or take the
derivative of `round`, which is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, function

from hf_qat.errors import TransformError


REFUSAL = (
    "torch.func (grad, jacrev, jvp, vmap, …), is_grads_batched=True, vectorize=True and derivatives in forward mode "
    "do not pass through quantizers: call backward() or torch.autograd.grad, once for each row of a Jacobian. Inside "
    "fake_quant_disabled(model), where a prepared model computes in float, all of them work."
)


def transforms_functions() -> bool:
    """Whether a transform of `torch.func` is active."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_transforms(*tensors: Tensor | None) -> None:
    """To be called where a quantizer rounds, or with the gradients that come to it.

    Raises:
        TransformError: a transform is active, or one of `tensors` is a batch of gradients.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise TransformError(REFUSAL)
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor):
            raise TransformError(REFUSAL)


def refuse_forward_mode() -> None:
    """The same for what can be vectorized, but has no derivatives.

    Raises:
        TransformError: derivatives are being computed in forward mode.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise TransformError(REFUSAL)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of the backward pass of an `autograd.Function`: no second derivatives, and no transforms."""

    @function.once_differentiable
    @wraps(backward)
    def alone(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_transforms(*grads)
        return backward(ctx, *grads)

    once: Callable[..., Any] = alone
    return once
