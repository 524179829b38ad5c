"""What accelerate leaves on a model that it has prepared for training: mixed precision around forward, and a mark.

A further training of the same model would find it prepared already, and compute in the precision of the one before.
"""

from __future__ import annotations

from torch import nn


def forget_mixed_precision(model: nn.Module) -> None:
    """Take off `model` what accelerate has put around its forward; one that a user gave to it is there again."""
    vars(model).pop("_is_accelerate_prepared", None)
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    del vars(model)["forward"]
    if getattr(original, "__func__", None) is not type(model).forward:
        vars(model)["forward"] = original
