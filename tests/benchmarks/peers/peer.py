"""What a peer has to do: quantize a float net so that it can be trained, and write it as ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


class UnsupportedTargetError(Exception):
    """A peer has no such numbers."""


@dataclass(frozen=True)
class Bits:
    """Of a target of the accuracy table, as peers are told.

    Attributes:
        weights, activations: width of the codes.
        edge: width of the weights, and of what goes into them, of the first convolution and the last linear layer.
        power_of_two: all scales are powers of two, one per tensor.
    """

    weights: int
    activations: int
    edge: int = 8
    power_of_two: bool = False


#: Those of our targets of the same names; what is hardest, and says most, comes first.
TARGETS = {
    "w4a4": Bits(4, 4),
    "int8": Bits(8, 8),
    "TDA4VM": Bits(8, 8, power_of_two=True),
    "w4a8": Bits(4, 8),
}


class Logits(nn.Module):
    """A float net as peers take it: a tensor of pixels in, a tensor of logits out.

    Args:
        model: of transformers, called with `pixel_values`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to logits (N, classes), or maps of them."""
        return self.model(pixel_values=pixels).logits


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        name: in the table.
        package: as the registry calls it, for its version.
        module: that is imported.
        targets: of `TARGETS`, that it has the numbers for.
        recipe: where its placement, calibration and training come from.
        quantize: float net in evaluation mode (its own to change), calibration batches (N, 3, H, W), bits → a module
            of the same call that trains with fake quantization.
        export: trained module in evaluation mode, pixels (N, 3, H, W) on its device, file. Writes QDQ ONNX whose first
            dimension is open, or of N.
        quantizers: how many tensors a trainable module rounds: weights, activations.
        advised_rates: learning rates that its documents name for fine-tuning.
    """

    name: str
    package: str
    module: str
    targets: tuple[str, ...]
    recipe: str
    quantize: Callable[[Logits, Sequence[Tensor], Bits], nn.Module]
    export: Callable[[nn.Module, Tensor, Path], None]
    quantizers: Callable[[nn.Module], tuple[int, int]]
    advised_rates: tuple[float, ...] = ()


@torch.no_grad()
def run_all(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """What calibration is to peers: calls with every batch."""
    for pixels in batches:
        model(pixels)


def edges(model: nn.Module) -> list[str]:
    """Names of the first convolution and of the last linear layer, which keep more bits at 4-bit targets."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [*convolutions[:1], *linears[-1:]]


def export_by_torchscript(module: nn.Module, pixels: Tensor, file: Path) -> None:
    """Write an ONNX file that takes batches of any size."""
    torch.onnx.export(
        module,
        (pixels,),
        file,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
