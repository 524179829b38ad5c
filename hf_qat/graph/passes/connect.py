"""Connect each layer with the quantizer whose codes come in: its scale decides the scale of the int32 bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import fx, nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import called_module, fetch
from hf_qat.graph.rules import Kind, rule_of
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize


Layer = TypeVar("Layer", bound=nn.Module)
Quantizer = TypeVar("Quantizer", bound=nn.Module)


def connect(captured: Mapping[str, CapturedModule]) -> None:
    """Tell every layer its input quantizer, following each input back through all that passes values on.

    A layer whose calls have different ones gets none, and keeps a float bias: its codes cannot have two scales.
    """
    for layer, quantizer in input_quantizers(captured, QATLayer, FakeQuantize).items():
        layer.set_input_quantizer(quantizer)


def input_quantizers(
    captured: Mapping[str, CapturedModule], layers: type[Layer], quantizers: type[Quantizer]
) -> dict[Layer, Quantizer]:
    """The quantizer whose codes come into each layer, for those that have one and the same in all calls.

    Args:
        captured: prepared or converted children, by path.
        layers, quantizers: classes of the ones and the others.
    """
    incoming: dict[Layer, set[Quantizer | None]] = {}
    for module in captured.values():
        passed: dict[fx.Node, Quantizer] = {}
        inputs = module.evaluation.inputs()
        for position, (other, name) in module.incoming_quantizer.items():
            passed[inputs[position]] = fetch(captured[other], name)
        for node in module.graph.nodes:
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            called = called_module(module, node)
            if isinstance(called, quantizers):
                passed[node] = called
            elif isinstance(called, layers):
                incoming.setdefault(called, set()).add(None if source is None else passed.get(source))
            elif rule_of(node).kind is Kind.PASS and source in passed:
                passed[node] = passed[source]
    return _same_in_all_calls(incoming)


def output_quantizers(
    captured: Mapping[str, CapturedModule], layers: type[Layer], quantizers: type[Quantizer]
) -> dict[Layer, Quantizer]:
    """The quantizer that rounds what each layer computes, for those whose calls all go into one and the same."""
    outgoing: dict[Layer, set[Quantizer | None]] = {}
    for module in captured.values():
        for node in module.graph.nodes:
            called = called_module(module, node)
            if isinstance(called, layers):
                users = {called_module(module, user) for user in node.users}
                found = users.pop() if len(users) == 1 else None
                outgoing.setdefault(called, set()).add(found if isinstance(found, quantizers) else None)
    return _same_in_all_calls(outgoing)


def _same_in_all_calls(found: Mapping[Layer, set[Quantizer | None]]) -> dict[Layer, Quantizer]:
    single = {layer: next(iter(of_calls)) for layer, of_calls in found.items() if len(of_calls) == 1}
    return {layer: quantizer for layer, quantizer in single.items() if quantizer is not None}
