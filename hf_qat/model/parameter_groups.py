"""Parameter groups for an optimizer: what weight decay is for, what it is not for, and the quantizers' own.

Decay would pull the logarithm of a learned scale to 0, that is the scale to 1, and an offset to the lowest code.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_qat.model.state import state_of
from hf_qat.quantization.quantizer import fake_quantizers


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of all parameters that require gradients, for any optimizer of `torch.optim`.

    Args:
        model: prepared; a float one has no third group.
        lr: learning rate of the weights.
        weight_decay: of the weights.

    Returns:
        Up to three groups, none of them empty: weights; norms and biases, which are all parameters with one axis or
        none, without decay; learned scales and offsets, without decay, at `scale_lr_multiplier` of the recipe times
        `lr`.

    Examples:
        optimizer = torch.optim.AdamW(hf_qat.parameter_groups(model, lr=1e-4, weight_decay=0.01))
    """
    state = state_of(model)
    scales = {id(parameter) for quantizer in fake_quantizers(model).values() for parameter in quantizer.parameters()}
    scale_lr = lr if state is None else lr * state.config.scale_lr_multiplier
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr, "weight_decay": weight_decay},
        {"params": [], "lr": lr, "weight_decay": 0.0},
        {"params": [], "lr": scale_lr, "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = 2 if id(parameter) in scales else 1 if parameter.dim() <= 1 else 0
            groups[group]["params"].append(parameter)
    return [group for group in groups if group["params"]]
