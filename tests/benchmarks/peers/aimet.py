"""Qualcomm's AIMET: batch norm folded, then `QuantizationSimModel` with ranges that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tests.benchmarks.peers.peer import Bits, Logits, Peer, edges, run_all


def quantize(model: Logits, batches: Sequence[Tensor], bits: Bits) -> nn.Module:
    """As in its guide to QAT with range learning."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.quantsim import QuantizationSimModel

    fold_all_batch_norms(model, tuple(batches[0].shape), batches[0])
    order = called_in_order(model, batches[0])
    simulation = QuantizationSimModel(
        model,
        batches[0],
        QuantScheme.training_range_learning_with_tf_init,
        default_output_bw=bits.activations,
        default_param_bw=bits.weights,
        config_file=get_path_for_per_channel_config(),
        in_place=True,
    )
    widen(simulation.model, order, bits.edge)
    simulation.compute_encodings(lambda made: run_all(made, batches))
    simulation.model.simulation = (simulation,)  # a tuple, so that it is no submodule of itself
    return simulation.model


def called_in_order(model: nn.Module, pixels: Tensor) -> list[str]:
    """Names of the modules without children that a net calls."""
    order: list[str] = []
    leaves = {name: each for name, each in model.named_modules() if not any(each.children())}
    hooks = [each.register_forward_hook(lambda *_, name=name: order.append(name)) for name, each in leaves.items()]
    run_all(model, [pixels])
    for hook in hooks:
        hook.remove()
    return order


def widen(model: nn.Module, order: Sequence[str], bits: int) -> None:
    """Weights and inputs of the layers at the edges; what goes into the last one, another module rounds."""
    first, last = edges(model)
    before = [model.get_submodule(name) for name in order[: order.index(last)]]
    into_last = [each for each in before if any(getattr(each, "output_quantizers", ()))][-1]
    layers = [model.get_submodule(name) for name in (first, last)]
    inputs = [each for layer in layers for each in (layer.param_quantizers["weight"], *layer.input_quantizers)]
    for quantizer in (*inputs, *layers[-1].output_quantizers, *into_last.output_quantizers):
        if quantizer is not None:
            quantizer.bitwidth = bits


def export(module: nn.Module, pixels: Tensor, file: Path) -> None:
    """`aimet_torch.onnx.export` writes QDQ."""
    from aimet_torch.onnx import export

    export(
        module,
        pixels,
        str(file),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=21,
        dynamo=False,
    )


def quantizers(module: nn.Module) -> tuple[int, int]:
    """Of weights, and of inputs and outputs of modules."""
    from aimet_torch.v2.quantization.base import QuantizerBase

    found = [name for name, each in module.named_modules() if isinstance(each, QuantizerBase)]
    weights = sum("param_quantizers" in name for name in found)
    return weights, len(found) - weights


PEER = Peer(
    "AIMET",
    "aimet-torch",
    "aimet_torch",
    ("int8", "w4a8", "w4a4"),
    "guide to QAT with range learning: batch norm folded before, default_config_per_channel, ranges trained",
    quantize,
    export,
    quantizers,
)
