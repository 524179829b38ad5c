"""What a kernel is told of the layer whose weight it folds, beside the weight and its scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


#: Below this, a channel's fold factor counts as zero: dividing by it would overflow float32.
SMALLEST_FACTOR = 1e-12


class Folding(NamedTuple):
    """What is fixed about a layer's weight.

    Attributes:
        qmin, qmax: lowest and highest code.
        axis: the axis of the weight that channels run along.
        power_of_two: the exponents of scales are rounded.
        live: the factor is divided out again, because a batch norm follows that uses batch statistics.
        eps: of the batch norm.
        dtype: of the folded weight and bias, where a kernel writes them.
    """

    qmin: int
    qmax: int
    axis: int
    power_of_two: bool
    live: bool
    eps: float
    dtype: torch.dtype


class Norm(NamedTuple):
    """The tensors of a batch norm, (C,) each, and the bias of the layer before it."""

    mean: Tensor
    variance: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    bias: Tensor | None


class FoldCall(NamedTuple):
    """What `hf_qat.quantization.layer_folding.fold_layer` is called with, for one layer."""

    weight: Tensor
    log2_scale: Tensor
    norm: Norm | None
    folding: Folding

    def kind(self) -> tuple[Any, ...]:
        """What layers that one kernel folds have in common."""
        present = tuple(tensor is not None for tensor in self.norm or ())
        return self.folding._replace(axis=0), self.log2_scale.dim(), self.weight.device, present

    def is_float32(self) -> bool:
        """Whether all its tensors are float32, as a kernel that is told addresses alone takes them to be."""
        tensors = (self.weight, self.log2_scale, *(self.norm or ()))
        return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)
