"""Batch norms that can be frozen: they use running statistics although they are in training, and keep them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_qat.errors import StageError
from hf_qat.quantization.class_swap import swap_class


class KeptStatistics(nn.Module):
    """Mixed into the class of a batch norm: while it is frozen, its statistics are not thrown away.

    Nothing would collect them anew, and the model would compute nonsense from there on.
    """

    batch_norm_frozen: bool

    def reset_running_stats(self) -> None:
        """As the batch norm's own.

        Raises:
            StageError: it is frozen.
        """
        if self.batch_norm_frozen:
            raise StageError(
                "batch norm is frozen: its statistics would be lost, and nothing collects them anew. They are part of "
                "the weights by now, and need no update_bn after weights were averaged; if you want it, call "
                "freeze_batch_norm(model, False) before it, and freeze_batch_norm(model) after it."
            )
        original: Any = super()
        original.reset_running_stats()


class FreezableBatchNorm(KeptStatistics):
    """Mixed into the class of a batch norm, above all of one that stays float (excluded): it can be frozen, too."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → the same shape; by running statistics if frozen."""
        frozen = self.batch_norm_frozen and self.training
        if frozen:
            self.training = False  # for its own forward, which may do more than normalise
        try:
            out: Tensor = super().forward(x)
        finally:
            if frozen:
                self.training = True
        return out


def install_freezable_norm(module: nn.Module) -> None:
    """Make a batch norm one that can be frozen, in place."""
    if not isinstance(module, FreezableBatchNorm):
        swap_class(module, FreezableBatchNorm).batch_norm_frozen = False
