"""NVIDIA's ModelOpt: `INT8_DEFAULT_CFG`, calibrated by maxima, scales frozen from then on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tests.benchmarks.peers.peer import Bits, Logits, Peer, edges, export_by_torchscript, run_all


def quantize(model: Logits, batches: Sequence[Tensor], bits: Bits) -> nn.Module:
    """`mtq.quantize`, as in its example of QAT for CNNs."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    widths = {"*weight_quantizer": bits.weights, "*input_quantizer": bits.activations}
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] in widths:
            entry["cfg"]["num_bits"] = widths[entry["quantizer_name"]]
    config["quant_cfg"] += [
        {"quantizer_name": f"*{name}.{kind}_quantizer", "cfg": {"num_bits": bits.edge, "axis": axis}}
        for name in edges(model)
        for kind, axis in (("weight", 0), ("input", None))
    ]
    return mtq.quantize(model, config, lambda made: run_all(made, batches))


def export(module: nn.Module, pixels: Tensor, file: Path) -> None:
    """Through TorchScript, which its quantizers have symbols for."""
    export_by_torchscript(module, pixels, file)


def quantizers(module: nn.Module) -> tuple[int, int]:
    """Of weights, and of what goes into layers."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    on = [name for name, each in module.named_modules() if isinstance(each, TensorQuantizer) and each.is_enabled]
    weights = sum(name.endswith("weight_quantizer") for name in on)
    return weights, len(on) - weights


PEER = Peer(
    "ModelOpt",
    "nvidia-modelopt",
    "modelopt",
    ("int8", "w4a8", "w4a4"),
    "INT8_DEFAULT_CFG and examples/cnn_qat: maxima, scales frozen; batch norm stays a layer, live",
    quantize,
    export,
    quantizers,
    advised_rates=(1e-4,),
)
