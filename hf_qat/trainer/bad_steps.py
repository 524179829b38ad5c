"""Steps whose gradients are not finite: a few are left out, many in a row end the training.

One damaged image is enough for a NaN, and the optimizer would carry it into every weight and every scale, for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_qat.errors import NonFiniteError


logger = logging.get_logger(__name__)

#: So many in a row are no longer the fault of a batch.
MOST_IN_A_ROW = 5

#: Buffers that a batch norm moves in its forward, before anybody can know whether the batch was bad.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class BadSteps:
    """Counts the steps of one training that were left out.

    Attributes:
        total: of this training.
        in_a_row: since the last step that was taken.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def leave_out_if_bad(self, model: nn.Module, norm: float, step: int) -> None:
        """Drop the gradients of a step if they are not finite: optimizers then leave every parameter as it is.

        Args:
            model: with gradients; in a distributed training, those that all processes agree on.
            norm: of all gradients.
            step: how many were taken before, for the message.

        Raises:
            NonFiniteError: the last `MOST_IN_A_ROW` were bad, too.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return
        model.zero_grad(set_to_none=True)
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteError(
                f"the gradients of {self.in_a_row} steps in a row held NaN or infinity, up to step {step + 1}; "
                "weights are those from before. Lower the learning rate; look for NaN and wrong labels in the "
                "data; in half precision, train in bf16 or float32. Then resume from the last checkpoint."
            )
        logger.warning(
            f"Step {step + 1} is left out: its gradients hold NaN or infinity (norm {norm}). Look at the images and "
            f"labels of its batch. So far {self.total} of {step + 1} steps; {MOST_IN_A_ROW} in a row end the training."
        )


@contextmanager
def statistics_kept_if_bad(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, put the loss into the list; if it is not finite, batch norms get back the statistics of before."""
    modules = list(model.modules())  # by `vars`: `getattr` of what a module lacks takes long, and this is every step
    are_frozen = all(vars(module).get("batch_norm_frozen", True) for module in modules)
    moving = [] if are_frozen else [module for module in modules if module.training]
    buffers = [b for module in moving for name in STATISTICS if (b := module._buffers.get(name)) is not None]
    before = [buffer.clone() for buffer in buffers]
    losses: list[Tensor] = []
    yield losses
    if not all(bool(loss.isfinite().all()) for loss in losses):
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
