"""Intel's NNCF: `nncf.quantize`, whose result is trained as it is; ranges are learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tests.benchmarks.peers.peer import Bits, Logits, Peer, export_by_torchscript


def quantize(model: Logits, batches: Sequence[Tensor], bits: Bits) -> nn.Module:
    """Post-training quantization of batches of the training set, as in its example of QAT."""
    import nncf

    attention = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    kind = nncf.ModelType.TRANSFORMER if attention else None
    return nncf.quantize(model, nncf.Dataset(list(batches)), model_type=kind)


def export(module: nn.Module, pixels: Tensor, file: Path) -> None:
    """`strip` makes PyTorch's own fake quantization of what was trained, and TorchScript knows that."""
    import nncf

    stripped = nncf.strip(module, example_input=pixels)
    export_by_torchscript(stripped, pixels, file)


def quantizers(module: nn.Module) -> tuple[int, int]:
    """Of weights, the second argument of a layer, and of activations."""
    from nncf.torch.quantization.layers import BaseQuantizer

    found = [name for name, each in module.named_modules() if isinstance(each, BaseQuantizer)]
    weights = sum("pre_hooks" in name and "__1." in name for name in found)
    return weights, len(found) - weights


PEER = Peer(
    "NNCF",
    "nncf",
    "nncf",
    ("int8",),
    "nncf.quantize and its example of QAT: ranges trained; batch norm stays a layer, live",
    quantize,
    export,
    quantizers,
    advised_rates=(1e-5,),
)
