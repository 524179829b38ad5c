"""What a converted model consists of, layer by layer, in the words of its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_qat.checkpoints.stored_format import quantized_layers
from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import listed
from hf_qat.model.in_float import by_reason, float_operations
from hf_qat.model.plan import EXCLUDED
from hf_qat.model.state import captured_children, require_stage
from hf_qat.publish.markdown import in_code
from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer
from hf_qat.quantization.spec import QuantizerSpec


#: What is said of a node of the ONNX file of which the graphs of the model know nothing.
UNKNOWN = "an input of it is not quantized, by the rules of the target"


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
class InFloat:
    """A row of what stays in float.

    Attributes:
        operation: PyTorch's name of it, or ONNX' where it lies outside of what was captured.
        places: modules, or nodes of the ONNX file, in words.
        reason: why.
    """

    operation: str
    places: str
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
    in_float: list[InFloat]


def summarize(model: nn.Module, float_ops: Mapping[str, Sequence[str]]) -> Summary:
    """Look through a converted model.

    Args:
        model: converted.
        float_ops: of the report of its export.

    Raises:
        StageError: the model is not converted.
    """
    require_stage(model, Stage.CONVERTED, "summarize")
    quantizers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizeDequantize)}
    modules = quantized_layers(model)
    layers = [_layer(path, module, quantizers) for path, module in modules.items()]
    return Summary(
        layers=layers,
        weights=dict(Counter(layer.weights for layer in layers).most_common()),
        activations=dict(Counter(describe_spec(module.spec) for module in quantizers.values()).most_common()),
        bits=sorted({module.weight_spec.bits for module in modules.values()}),
        in_float=_in_float(model, float_ops),
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


def _in_float(model: nn.Module, float_ops: Mapping[str, Sequence[str]]) -> list[InFloat]:
    """What the graphs of the model know; for all that lies elsewhere, what can be told from the ONNX file."""
    config = require_stage(model, Stage.CONVERTED, "summarize").config
    known = float_operations(model)
    rows = [
        InFloat(operation, _named(paths), reason)
        for reason, operations in by_reason(known).items()
        for operation, paths in operations.items()
    ]
    explained = [
        child for child in captured_children(model) if any(_is_below(operation.path, child) for operation in known)
    ]
    for operator, nodes in float_ops.items():
        reasons: dict[str, list[str]] = {}
        for node in nodes:
            path = node.rpartition("/")[0]
            if not any(_is_below(path, child) for child in explained):
                reasons.setdefault(EXCLUDED if config.excludes(path) else UNKNOWN, []).append(node)
        rows += [InFloat(operator, _named(places), reason) for reason, places in reasons.items()]
    return rows


def _is_below(path: str, parent: str) -> bool:
    """Whether a module is `parent` or inside of it; all are in the model itself, whose path is empty."""
    return not parent or path == parent or path.startswith(f"{parent}.")


def _named(places: Sequence[str]) -> str:
    return listed([in_code(place) if place else "the model" for place in dict.fromkeys(places)])
