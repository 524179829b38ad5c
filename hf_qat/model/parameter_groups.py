"""Parameter groups for an optimizer: what weight decay is for, what it is not for, and the quantizers' own.

Decay would pull the logarithm of a learned scale to 0, that is the scale to 1, and an offset to the lowest code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_qat.quantization.quantizer import fake_quantizers


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of all parameters that require gradients, for any optimizer of `torch.optim`.

    Args:
        model: prepared; a part of such a model, or a module around one or several. A float one has no third group.
        lr: learning rate of the weights.
        weight_decay: of the weights.

    Returns:
        Up to three groups, none of them empty: weights; norms and biases, which are all parameters with one axis or
        none, without decay; learned scales and offsets, without decay, at `scale_lr_multiplier` of the recipe times
        `lr`, which are two groups or more where models of several recipes are parts of `model`.

    Examples:
        optimizer = torch.optim.AdamW(hf_qat.parameter_groups(model, lr=1e-4, weight_decay=0.01))

        A scheduler that takes rates of its own needs one for each group, or all get the same:

        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=1000)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = {id(scale) for scale in scale_parameters(model)}
    weights = [p for p in trained if p.dim() > 1 and id(p) not in others]
    vectors = [p for p in trained if p.dim() <= 1 and id(p) not in others]
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        *_scale_groups(model, lr),
    ]
    return [group for group in groups if group["params"]]


def _scale_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """A group of the scales and offsets that require gradients, for each multiplier of their rates."""
    scales: dict[float, list[nn.Parameter]] = {}
    for quantizer in fake_quantizers(model).values():
        scales.setdefault(quantizer.lr_multiplier, []).extend(p for p in quantizer.parameters() if p.requires_grad)
    return [scale_group(parameters, lr, multiplier) for multiplier, parameters in scales.items()]


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All learned scales and offsets of a prepared model."""
    return [parameter for quantizer in fake_quantizers(model).values() for parameter in quantizer.parameters()]


def scale_group(scales: Sequence[nn.Parameter], lr: float | None, multiplier: float) -> dict[str, Any]:
    """The group of learned scales and offsets: no weight decay, and `multiplier` times the learning rate.

    Some optimizers find their own rate, and have `None` there.
    """
    return {"params": list(scales), "lr": None if lr is None else lr * multiplier, "weight_decay": 0.0}
