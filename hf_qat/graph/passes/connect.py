"""Connect each layer with the quantizer whose codes come in: its scale decides the scale of the int32 bias."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import called_module, fetch
from hf_qat.graph.rules import Kind, rule_of
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize


def connect(captured: Mapping[str, CapturedModule]) -> None:
    """Tell every layer its input quantizer, following each input back through all that passes values on.

    A layer whose calls have different ones gets none, and keeps a float bias: its codes cannot have two scales.
    """
    incoming: dict[QATLayer, set[FakeQuantize | None]] = {}
    for module in captured.values():
        passed: dict[fx.Node, FakeQuantize] = {}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for position, (other, name) in module.incoming_quantizer.items():
            passed[placeholders[position]] = fetch(captured[other], name)
        for node in module.graph.nodes:
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            called = called_module(module, node)
            if isinstance(called, FakeQuantize):
                passed[node] = called
            elif isinstance(called, QATLayer):
                incoming.setdefault(called, set()).add(None if source is None else passed.get(source))
            elif rule_of(node).kind is Kind.PASS and source in passed:
                passed[node] = passed[source]
    for layer, quantizers in incoming.items():
        if len(quantizers) == 1 and (quantizer := quantizers.pop()) is not None:
            layer.set_input_quantizer(quantizer)
