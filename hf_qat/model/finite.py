"""Refuse a model that holds NaN or infinity, before anything is made of it that hides them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_qat.errors import NonFiniteError


#: Last parts of the names of buffers that a model computes with as with weights: those of batch norms, of quantizers
#: and of converted layers. Others may hold infinities on purpose (masks), or nothing yet.
LIKE_WEIGHTS = frozenset(
    {"running_mean", "running_var", "weight", "bias", "scale", "weight_scale", "bias_scale"}
    | {"log2_scale", "offset", "range_min", "range_max"}
)


def require_finite(model: nn.Module, action: str) -> None:
    """All parameters of `model`, and the buffers that are like them, must be finite for `action`.

    Raises:
        NonFiniteError: one is not; the message names it.
    """
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in LIKE_WEIGHTS]
    for name, tensor in (*model.named_parameters(), *buffers):
        if not _is_finite(tensor):
            what = "NaN" if bool(tensor.isnan().any()) else "infinity"
            raise NonFiniteError(
                f"cannot {action}: {name} of {type(model).__name__} holds {what}. Look for it in the checkpoint that "
                "was loaded, or for the step at which training diverged, and load weights from before it."
            )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    if tensor.sum().isfinite():  # NaN and infinity survive a sum, which is one quick pass
        return True
    return bool(torch.isfinite(tensor).all())  # where it overflowed, too
