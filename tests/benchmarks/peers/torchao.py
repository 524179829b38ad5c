"""torchao's PT2E: the net as `torch.export` sees it, fake quantization where XNNPACK's quantizer asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.benchmarks.peers.peer import Bits, Logits, Peer, run_all


#: What the codes of a net's last linear layer pass through.
HANDED_ON = (
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten.dropout.default,
)


def quantize(model: Logits, batches: Sequence[Tensor], bits: Bits) -> nn.Module:
    """`prepare_qat_pt2e`, as in its tutorial; a pass over the calibration batches gives the observers a start."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer

    quantizer = XNNPACKQuantizer().set_global(scheme(bits.weights, bits.activations))
    batch = torch.export.Dim("batch", max=4096)
    captured = torch.export.export(model, (batches[0],), dynamic_shapes=({0: batch},), strict=True).module()
    made = allow_exported_model_train_eval(prepare_qat_pt2e(captured, quantizer))
    widen(made, bits.edge)
    made.eval()
    run_all(made, batches)
    return made


def widen(made: torch.fx.GraphModule, bits: int) -> None:
    """Fake quantizers of what goes into the first convolution and the last linear layer, and of what that makes.

    `set_module_name`, which is meant for that, leaves a convolution before batch norm without any in QAT.
    """
    first = made.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)[0]
    last = made.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[-1]
    found, reached = [], [*first.all_input_nodes[:2], *last.all_input_nodes[:2], *last.users]
    while reached:
        node = reached.pop()
        if node.op == "call_module":
            found.append(made.get_submodule(str(node.target)))
        if node.op == "call_module" or node.target in HANDED_ON:
            reached += node.all_input_nodes
    for each in found:
        half = 2 ** (bits - 1)
        limits = (1 - half if each.is_per_channel else -half), half - 1
        each.quant_min, each.quant_max = limits
        each.activation_post_process.quant_min, each.activation_post_process.quant_max = limits


def scheme(weights: int, activations: int) -> object:
    """Of XNNPACK, at other widths: symmetric weights per channel, activations with a zero point."""
    from torchao.testing.pt2e._xnnpack_quantizer import get_symmetric_quantization_config

    return get_symmetric_quantization_config(
        is_per_channel=True,
        is_qat=True,
        act_qmin=-(2 ** (activations - 1)),
        act_qmax=2 ** (activations - 1) - 1,
        weight_qmin=1 - 2 ** (weights - 1),
        weight_qmax=2 ** (weights - 1) - 1,
    )


def export(module: nn.Module, pixels: Tensor, file: Path) -> None:
    """Converted, which folds batch norm, then through the exporter of graphs; its operators are known to that."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    converted = convert_pt2e(module)
    torch.onnx.export(converted, (pixels,), file, input_names=["pixel_values"], output_names=["logits"], dynamo=True)


def quantizers(module: nn.Module) -> tuple[int, int]:
    """Of weights, which have a scale per channel, and of activations."""
    from torchao.quantization.pt2e import FakeQuantizeBase

    found = [each for each in module.modules() if isinstance(each, FakeQuantizeBase)]
    weights = sum(each.is_per_channel for each in found)
    return weights, len(found) - weights


PEER = Peer(
    "torchao PT2E",
    "torchao",
    "torchao",
    ("int8", "w4a8", "w4a4"),
    "tutorial of QAT by PT2E, XNNPACKQuantizer: ranges observed; batch norm folded into what is rounded, live",
    quantize,
    export,
    quantizers,
)
