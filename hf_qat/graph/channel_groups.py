"""Which layers of a prepared model may share out a factor per channel without changing what the model computes.

A layer makes a channel `s` times as large, whatever reads it divides its weights by `s`: between the two stand only
operations that commute with a positive factor per channel (Nagel et al. 2019, §4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import called_module
from hf_qat.graph.rules import Kind, rule_of
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize


aten = torch.ops.aten

#: Of feature maps, (N, C, …): each channel is computed by itself, and `f(s * x) = s * f(x)` for `s > 0`.
_SPATIAL = frozenset(
    overload
    for packet in (
        aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d,
        aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d,
        aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_linear1d,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)  # fmt: skip

#: The same of any tensor, whichever axis channels run along.
_ELEMENTWISE = frozenset({aten.relu.default, aten.leaky_relu.default})

#: What an activation of a quantizer, or an operation, cuts its input off at.
_CLAMPS = {"relu6": 6.0}


@dataclass
class ChannelGroup:
    """Layers that can share out one factor per channel.

    Attributes:
        producers: layers whose output channels these are.
        consumers: layers that read them, and nothing else does.
        quantizers: of the tensors that have these channels.
        ceiling: what a channel is cut off at on its way, by ReLU6; `None` for no such thing.
        clamped: the quantizers behind which it is.
    """

    producers: list[QATLayer] = field(default_factory=list)
    consumers: list[QATLayer] = field(default_factory=list)
    quantizers: list[FakeQuantize] = field(default_factory=list)
    ceiling: float | None = None
    clamped: list[FakeQuantize] = field(default_factory=list)


#: A value: of a node in a graph, or what all calls of a layer have in common.
_Value = tuple[Any, ...]


class _Links:
    """Values that have one factor per channel in common, and those that have none because something else sees them."""

    def __init__(self) -> None:
        self._parent: dict[_Value, _Value] = {}
        self._fixed: set[_Value] = set()

    def root(self, value: _Value) -> _Value:
        """The same for all values that are linked."""
        parent = self._parent.setdefault(value, value)
        if parent != value:
            parent = self._parent[value] = self.root(parent)
        return parent

    def link(self, one: _Value, other: _Value) -> None:
        """What scales one scales the other."""
        self._parent[self.root(one)] = self.root(other)

    def fix(self, value: _Value) -> None:
        """Nothing may scale it."""
        self._fixed.add(value)

    def fixed_roots(self) -> set[_Value]:
        """Roots of values that nothing may scale."""
        return {self.root(value) for value in self._fixed}


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """All groups of `model` that have a producer and a consumer, in the order of their first producer.

    A layer whose parameters do not require gradients, or are another module's as well, keeps its weights.

    Args:
        model: prepared.
    """
    links, found = _Links(), _Found({}, {}, {}, {})
    for name, captured in model.named_modules():
        if isinstance(captured, CapturedModule):
            for number, one_way in enumerate(captured.graphs):
                _follow(captured, one_way.graph, (name, number), links, found)
    shared = _shared_parameters(model)
    for layer in {*found.producers, *found.consumers}:
        if not _may_change(layer, shared):
            links.fix(("in", layer))
            links.fix(("out", layer))
    return [group for group in _collected(links, found) if _is_consistent(group)]


@dataclass
class _Found:
    """Layers and quantizers → a value of theirs; of `clamped`, one that is cut off, and at what."""

    producers: dict[QATLayer, _Value]
    consumers: dict[QATLayer, _Value]
    quantizers: dict[FakeQuantize, _Value]
    clamped: dict[FakeQuantize, float]


def _follow(captured: CapturedModule, graph: fx.Graph, place: _Value, links: _Links, found: _Found) -> None:
    """Link the values of one graph."""
    for node in graph.nodes:
        value, module = (*place, node.name), called_module(captured, node)
        inputs = [(*place, source.name) for source in node.all_input_nodes]
        if isinstance(module, FakeQuantize) and module.spec.axis is None:
            links.link(value, inputs[0])
            found.quantizers[module] = value
            if clamp := _CLAMPS.get(str(node.kwargs.get("activation"))):
                found.clamped[module] = clamp
        elif isinstance(module, QATLayer) and len(inputs) == 1 and _mixes(module):
            links.link(inputs[0], ("in", module))
            links.link(value, ("out", module))
            found.consumers[module], found.producers[module] = ("in", module), ("out", module)
        elif _commutes(node):
            for source in inputs:
                links.link(value, source)
        else:
            for each in (value, *inputs):
                links.fix(each)


def _mixes(layer: QATLayer) -> bool:
    """Whether it is a convolution or a linear layer: a batch norm on its own is a layer, too."""
    weight: Tensor | None = layer.weight
    return weight is not None and weight.dim() > 1


def _commutes(node: fx.Node) -> bool:
    """Whether an operation hands a positive factor per channel on."""
    if node.op != "call_function":
        return False
    if node.target is aten.pad.default:
        return rule_of(node).kind is Kind.PASS  # other constants than 0 would have to be scaled, too
    if node.target is aten.add.Tensor:  # of a number, or of a parameter, it does not
        return all(isinstance(term, fx.Node) for term in node.args[:2])
    return node.target in _SPATIAL or node.target in _ELEMENTWISE


def _shared_parameters(model: nn.Module) -> set[int]:
    """Of which more than one module has them."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _may_change(layer: QATLayer, shared: set[int]) -> bool:
    norm = layer.batch_norm
    parameters = [*layer.parameters(recurse=False), *(() if norm is None else norm.parameters(recurse=False))]
    own = all(parameter.requires_grad and id(parameter) not in shared for parameter in parameters)
    affine = norm is None or getattr(norm, "weight", None) is not None and getattr(norm, "bias", None) is not None
    return own and affine and layer.channel_axis == 0 and not layer.weight_quantizer.frozen


def _collected(links: _Links, found: _Found) -> Iterator[ChannelGroup]:
    fixed, groups = links.fixed_roots(), dict[_Value, ChannelGroup]()
    for layer, value in found.producers.items():
        if (root := links.root(value)) not in fixed:
            groups.setdefault(root, ChannelGroup()).producers.append(layer)
    for layer, value in found.consumers.items():
        if (root := links.root(value)) in groups:
            groups[root].consumers.append(layer)
    for quantizer, value in found.quantizers.items():
        if (group := groups.get(links.root(value))) is not None:
            group.quantizers.append(quantizer)
            if quantizer in found.clamped:
                group.ceiling = found.clamped[quantizer]
                group.clamped.append(quantizer)
    yield from groups.values()


def _is_consistent(group: ChannelGroup) -> bool:
    """Whether all its layers mean the same channels, which run along the same axis."""
    layers: Sequence[QATLayer] = [*group.producers, *group.consumers]
    of_maps = {layer.weight.dim() > 2 for layer in layers}
    counts = {layer.weight.shape[0] for layer in group.producers} | {channels_read(c) for c in group.consumers}
    return bool(group.consumers) and bool(group.quantizers) and len(of_maps) == 1 and len(counts) == 1


def channels_read(layer: QATLayer) -> int:
    """How many channels the input of a layer has."""
    return int(layer.weight.shape[1]) * groups_of(layer)


def groups_of(layer: QATLayer) -> int:
    """Into how many groups its channels are divided; 1 of a linear layer."""
    arguments = layer.operation_args
    return int(arguments[-1]) if layer.weight.dim() > 2 and len(arguments) == 4 else 1
