"""What is seen of quantizers only by looking again and again while a model trains: turning codes, and drifting ranges.

Oscillation: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", section 3: a weight whose
latent value lies near the edge of two codes is rounded to one and the other in turn, and settles on neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.weight_quantizer import activation_quantizers


class CodeHistory:
    """The codes of all weights when they were last looked at, and the way in which each changed last.

    Costs 3 bytes for each weight, and the rounding of all weights at each look.
    """

    def __init__(self) -> None:
        self._codes: dict[str, Tensor] = {}
        self._directions: dict[str, Tensor] = {}

    @torch.no_grad()
    def share_turned(self, model: nn.Module) -> Tensor:
        """Look at the codes of a prepared model.

        Returns:
            Share of the weights whose code has changed since the look before, against the way in which it had changed
            the time before: () float32. Nagel et al. 2022 look after every step; this sees what its looks show.
        """
        turned, total = torch.tensor(0.0, dtype=torch.float32), 0
        for path, layer in qat_layers(model).items():
            codes = layer.codes(layer.weight_quantizer.scale).to(torch.int16)
            total += codes.numel()
            before = self._codes.get(path)
            self._codes[path] = codes
            if before is None or before.shape != codes.shape:
                self._directions[path] = torch.zeros_like(codes, dtype=torch.int8)
                continue
            change = (codes - before).sign().to(torch.int8)
            direction = self._directions[path]
            turned = turned.to(codes.device) + ((change != 0) & (change == -direction)).sum()
            self._directions[path] = torch.where(change != 0, change, direction)
        return turned / max(1, total)


class RangeHistory(TrainerCallback):
    """Keeps the ranges of activations at every log of the training loss, to be plotted.

    Attributes:
        steps: of the logs.
        ranges: path of a quantizer → at each of these steps the largest magnitude that its codes reach.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ranges: dict[str, list[float]] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at all ranges, if the training loss was logged."""
        if "loss" not in (logs or {}):
            return
        reaches = activation_reaches(kwargs["model"])
        self.steps.append(state.global_step)
        for path, reach in reaches.items():
            self.ranges.setdefault(path, []).append(reach)


@torch.no_grad()
def activation_reaches(model: nn.Module) -> dict[str, float]:
    """Path of each quantizer of activations whose range can move → the largest magnitude that its codes reach."""
    found = {}
    for path, quantizer in activation_quantizers(model).items():
        if quantizer.spec.fixed_scale is not None:
            continue
        zero = torch.zeros((), dtype=torch.float32) if quantizer.zero_point is None else quantizer.zero_point.round()
        ends = torch.stack([(code - zero.float()).abs().max() for code in (quantizer.spec.qmin, quantizer.spec.qmax)])
        found[path] = float(ends.max() * quantizer.scale.max())
    return found
