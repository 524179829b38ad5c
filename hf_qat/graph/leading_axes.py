"""Graphs that take tensors of any number of axes, because all that they compute is along the last one or pointwise.

Detectors that train with a loss on every layer of the decoder give their heads one axis more than in inference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx, nn

from hf_qat.graph.nodes import called_module
from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize


aten = torch.ops.aten

#: They treat every row of the last axis, or every number, alike.
POINTWISE = frozenset(
    {
        aten.linear.default,
        aten.relu.default,
        aten.relu_.default,
        aten.gelu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.dropout.default,
    }
)


def takes_leading_axes(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether `graph`, which is one of `module`, computes the same on tensors of more or fewer leading axes."""
    return all(_is_pointwise(module, node) for node in graph.nodes)


def _is_pointwise(module: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return node.op in ("placeholder", "get_attr", "output") or node.target in POINTWISE
    called = called_module(module, node)
    if isinstance(called, (QATLayer, QuantizedLayer)):
        operation: Any = called.operation
        of_layer = operation.func if isinstance(operation, partial) else operation
        return of_layer is aten.linear.default and getattr(called, "batch_norm", None) is None
    return isinstance(called, (FakeQuantize, QuantizeDequantize)) and called.spec.axis is None
