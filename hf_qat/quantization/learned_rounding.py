"""Which of its two nearest codes each weight gets, learned by gradient.

The choice is that of AdaRound (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"). It
is learned straight through the rounding (Bengio et al. 2013) instead of by AdaRound's soft codes, so that whatever
else learns meanwhile always sees the codes that there will be; that needs no annealing, and hundreds of steps, not
ten thousands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_qat.quantization.fake_quantize import along
from hf_qat.quantization.kernels.folding import SMALLEST_FACTOR
from hf_qat.quantization.layers import QATLayer


#: Where a weight goes whose code was changed: so far from the middle between two codes, in steps. Just inside, so that
#: a training which follows finds it near the boundary, as the float weight is; and clear of float32 rounding.
INSIDE = 0.02


class LearnedRounding:
    """The weights of layers while their rounding is learned; the layers themselves stay as they are until `write`.

    All weights are one vector: an operation on it takes less time than one for each layer.

    Args:
        layers: with scales.

    Attributes:
        position: parameter, (number of weights,), 0 to 1: where each weight is between its two codes.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[QATLayer]) -> None:
        self.layers = layers
        steps, positions, limits = [], [], []
        for layer in layers:
            spec, weight = layer.weight_quantizer.spec, layer.float_weight()
            step = along(layer.device_scale(), weight, layer.channel_axis).expand_as(weight)
            steps.append(step.flatten())
            positions.append((weight / step).clamp(spec.qmin, spec.qmax).flatten())
            limits.append(torch.full_like(positions[-1], spec.qmax - 1))
        exact = torch.cat(positions)
        self.step, self.low = torch.cat(steps), torch.minimum(exact.floor(), torch.cat(limits))
        self.nearest_is_upper = exact.round() > self.low
        self.position = nn.Parameter(exact - self.low)

    def weights(self) -> list[Tensor]:
        """The folded and rounded weight of each layer; the gradient of `position` passes straight through."""
        upper = (self.position.detach() >= 0.5).to(self.position)
        return self._of_layers((self.low + upper + (self.position - self.position.detach())) * self.step)

    def _of_layers(self, values: Tensor) -> list[Tensor]:
        parts = values.split([layer.weight.numel() for layer in self.layers])
        return [part.view(layer.weight.shape) for part, layer in zip(parts, self.layers, strict=True)]

    @torch.no_grad()
    def limit(self) -> None:
        """Take positions back to between the two codes, after a step of an optimizer."""
        self.position.clamp_(0.0, 1.0)

    @torch.no_grad()
    def write(self) -> int:
        """Move the weights whose code is not the nearest one into the cell of their code; returns how many."""
        upper = self.position >= 0.5
        changed = upper != self.nearest_is_upper
        position = torch.where(upper, self.position.new_tensor(0.5 + INSIDE), 0.5 - INSIDE)
        folded = (self.low + position) * self.step
        for layer, values, moved in zip(self.layers, self._of_layers(folded), self._of_layers(changed), strict=True):
            factor = layer.fold_factor()
            if factor is not None:
                factor = along(factor, values, layer.channel_axis)
                moved, values = moved & (factor.abs() > SMALLEST_FACTOR), values / factor
            layer.weight.copy_(torch.where(moved, values, layer.weight))
        return int(changed.sum())
