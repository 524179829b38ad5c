"""What a converted model consists of, layer by layer, in the words of its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_qat.checkpoints.stored_format import quantized_layers
from hf_qat.config.qat_config import QATConfig
from hf_qat.model.state import require_stage
from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer
from hf_qat.quantization.spec import QuantizerSpec


#: Of a name that several nodes share, a card names so many.
SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """One quantized layer.

    Attributes:
        path, kind: of the module, as `Conv2d 3×3`.
        weights, output: how they are quantized; an output without a quantizer of its own is empty.
        parameters: how many weights.
    """

    path: str
    kind: str
    weights: str
    output: str
    parameters: int


@dataclass(frozen=True)
class FloatOperation:
    """Nodes of one operator that compute with numbers which are not quantized, and why."""

    operator: str
    nodes: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """The layers of a converted model.

    Attributes:
        layers: with weights, in the order of the model.
        weights, activations: form → how many layers, or tensors between them, have it.
        bits: of the weights, all widths that occur.
        in_float: what is left in float.
    """

    layers: list[Layer]
    weights: dict[str, int]
    activations: dict[str, int]
    bits: list[int]
    in_float: list[FloatOperation]


def summarize(model: nn.Module, float_ops: Mapping[str, Sequence[str]]) -> Summary:
    """Look through a converted model.

    Args:
        model: converted.
        float_ops: of the report of its export.

    Raises:
        StageError: the model is not converted.
    """
    config = require_stage(model, "converted", "summarize").config
    quantizers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizeDequantize)}
    modules = quantized_layers(model)
    layers = [_layer(path, module, quantizers) for path, module in modules.items()]
    return Summary(
        layers=layers,
        weights=dict(Counter(layer.weights for layer in layers).most_common()),
        activations=dict(Counter(describe_spec(module.spec) for module in quantizers.values()).most_common()),
        bits=sorted({module.weight_spec.bits for module in modules.values()}),
        in_float=[
            FloatOperation(operator, _named(nodes), reason)
            for operator, all_nodes in float_ops.items()
            for reason, nodes in _by_reason(all_nodes, config).items()
        ],
    )


def _layer(path: str, module: QuantizedLayer, quantizers: Mapping[str, QuantizeDequantize]) -> Layer:
    kind = type(module).__name__
    size = getattr(module, "kernel_size", None)
    if isinstance(size, tuple):
        kind += " " + "×".join(map(str, size))
    if getattr(module, "groups", 1) > 1:
        kind += " depthwise" if module.groups == module.in_channels else " grouped"
    output = quantizers.get(f"{path}.activation_quantizer")
    return Layer(
        path=path,
        kind=kind,
        weights=describe_spec(module.weight_spec),
        output="" if output is None else describe_spec(output.spec),
        parameters=module.codes.numel(),
    )


def describe_spec(spec: QuantizerSpec) -> str:
    """A quantizer in a few words, as `int8, per channel`."""
    form = f"{'int' if spec.signed else 'uint'}{spec.bits}"
    if not spec.symmetric:
        form += ", zero point"
    if spec.axis is not None:
        form += ", per channel"
    if spec.fixed_scale is not None:
        return f"{form}, fixed scale"
    return f"{form}, power-of-two scale" if spec.power_of_two else form


def _by_reason(nodes: Sequence[str], config: QATConfig) -> dict[str, list[str]]:
    """The nodes of one operator, by why they are in float."""
    reasons: dict[str, list[str]] = {}
    for name in nodes:
        excluded = config.excludes(name.rpartition("/")[0])
        reason = (
            "excluded by the recipe" if excluded else "an input of it is not quantized, by the rules of the target"
        )
        reasons.setdefault(reason, []).append(name)
    return reasons


def _named(nodes: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in nodes[:SHOWN])
    return f"{shown} and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else shown
