"""Which layers of a prepared model may share out a factor per channel without changing what the model computes.

A layer makes a channel `s` times as large, whatever reads it divides its weights by `s`: between the two stand only
operations that commute with a positive factor per channel (Nagel et al. 2019, §4.1). A layer norm makes channels of
any size by its weight and bias (Xiao et al. 2023, "SmoothQuant", §4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.channel_axes import Channels, channels_after
from hf_qat.graph.nodes import called_module, fetch
from hf_qat.graph.norm_calls import is_own
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize


aten = torch.ops.aten

#: What an activation of a quantizer, or an operation, cuts its input off at.
_CLAMPS = {"relu6": 6.0}


@dataclass
class ChannelGroup:
    """Layers that can share out one factor per channel.

    Attributes:
        producers: layers whose output channels these are.
        norms: layer norms whose output channels these are.
        consumers: layers that read them, and nothing else does.
        quantizers: of the tensors that have these channels → along which axis, counted from the end.
        ceiling: what a channel is cut off at on its way, by ReLU6; `None` for no such thing.
        clamped: the quantizers behind which it is.
    """

    producers: list[QATLayer] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    consumers: list[QATLayer] = field(default_factory=list)
    quantizers: dict[FakeQuantize, int] = field(default_factory=dict)
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
    links, found = _Links(), _Found({}, {}, {}, {}, {})
    for name, captured in model.named_modules():
        if isinstance(captured, CapturedModule):
            for number, one_way in enumerate(captured.graphs):
                _Walk(captured, (name, number), links, found).follow(one_way.graph)
    shared = _shared_parameters(model)
    for module in {*found.producers, *found.consumers}:
        if not _may_change(module, shared):
            links.fix(("in", module))
            links.fix(("out", module))
    return [group for group in _collected(links, found) if _is_consistent(group)]


@dataclass
class _Found:
    """Layers, norms and quantizers → a value of theirs; of quantizers, the axis of channels, and where they clamp."""

    producers: dict[nn.Module, _Value]
    consumers: dict[QATLayer, _Value]
    quantizers: dict[FakeQuantize, _Value]
    axes: dict[FakeQuantize, int]
    clamped: dict[FakeQuantize, float]


class _Walk:
    """Links the values of one graph."""

    def __init__(self, captured: CapturedModule, place: _Value, links: _Links, found: _Found) -> None:
        self.captured, self.place, self.links, self.found = captured, place, links, found
        self.channels: dict[fx.Node, Channels] = {}

    def follow(self, graph: fx.Graph) -> None:
        """Go through all nodes."""
        for node in graph.nodes:
            module = called_module(self.captured, node)
            if node.op == "get_attr":
                self.links.link(self._value(node), ("tensor", id(fetch(self.captured, str(node.target)))))
            elif isinstance(module, FakeQuantize) and module.spec.axis is None:
                self._quantizer(node, module)
            elif isinstance(module, QATLayer) and len(node.all_input_nodes) == 1 and _mixes(module):
                self._layer(node, module)
            elif (norm := _norm(self.captured, node)) is not None:
                self._norm(node, norm)
            else:
                self._operation(node)

    def _value(self, node: fx.Node) -> _Value:
        return (*self.place, node.name)

    def _fix(self, *nodes: fx.Node) -> None:
        for node in nodes:
            self.links.fix(self._value(node))

    def _quantizer(self, node: fx.Node, module: FakeQuantize) -> None:
        source = node.all_input_nodes[0]
        if (channels := self.channels.get(source)) is None:
            self._fix(node, source)
            return
        self.channels[node] = channels
        self.links.link(self._value(node), self._value(source))
        self.links.link(self._value(node), ("quantizer", module))
        if self.found.axes.setdefault(module, channels.axis) != channels.axis:
            self._fix(node)
        self.found.quantizers[module] = self._value(node)
        if clamp := _CLAMPS.get(str(node.kwargs.get("activation"))):
            self.found.clamped[module] = clamp

    def _layer(self, node: fx.Node, layer: QATLayer) -> None:
        axis, source = 1 - layer.weight.dim(), node.all_input_nodes[0]
        if (channels := self.channels.get(source)) is None or channels.axis != axis:
            self._fix(source)
        self.links.link(self._value(source), ("in", layer))
        self.links.link(self._value(node), ("out", layer))
        self.found.consumers[layer], self.found.producers[layer] = ("in", layer), ("out", layer)
        self.channels[node] = Channels(int(layer.weight.shape[0]), axis)

    def _norm(self, node: fx.Node, norm: nn.Module) -> None:
        """Its weight and its bias go along with its output."""
        read, *parameters = node.all_input_nodes
        self._fix(read)
        for each in (node, *parameters):
            self.links.link(self._value(each), ("out", norm))
        self.found.producers[norm] = ("out", norm)
        weight: Any = norm.weight
        self.channels[node] = Channels(len(weight), -1)

    def _operation(self, node: fx.Node) -> None:
        dropout = isinstance(called_module(self.captured, node), nn.modules.dropout._DropoutNd)
        read = [self.channels.get(source) for source in node.all_input_nodes]
        if (channels := read[0] if dropout else channels_after(node, read)) is None:
            self._fix(node, *node.all_input_nodes)
            return
        self.channels[node] = channels
        for source in node.all_input_nodes:
            self.links.link(self._value(node), self._value(source))


def _norm(captured: CapturedModule, node: fx.Node) -> nn.Module | None:
    """The layer norm over the last axis that a node computes for, with a weight of its own; `None` if it is none."""
    if node.target is not aten.layer_norm.default or len(node.args) < 3:
        return None
    _, shape, weight, bias = (*node.args[:4], None)[:4]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(shape) != 1:  # type: ignore[arg-type]
        return None
    path = str(weight.target).rpartition(".")[0]
    module: nn.Module = captured.get_submodule(path)
    own = is_own(module, path, "weight", weight) and is_own(module, path, "bias", bias)
    trained = all(isinstance(value, nn.Parameter) for value in (module.weight, module.bias) if value is not None)
    return module if own and trained else None


def _mixes(layer: QATLayer) -> bool:
    """Whether it is a convolution or a linear layer: a batch norm on its own is a layer, too."""
    weight: Tensor | None = layer.weight
    return weight is not None and weight.dim() > 1


def _shared_parameters(model: nn.Module) -> set[int]:
    """Of which more than one module has them, or whose batch norm is folded into more than one layer."""
    modules = list(model.modules())
    norms = Counter(module.batch_norm for module in modules if isinstance(module, QATLayer) and module.batch_norm)
    owners = [*modules, *(norm for norm, layers in norms.items() if layers > 1)]
    counts = Counter(id(parameter) for owner in owners for parameter in owner.parameters(recurse=False))
    return {key for key, count in counts.items() if count > 1}


def _may_change(module: nn.Module, shared: set[int]) -> bool:
    layer, norm = (module, module.batch_norm) if isinstance(module, QATLayer) else (None, module)
    parameters = [*module.parameters(recurse=False), *(() if norm is None else norm.parameters(recurse=False))]
    own = all(parameter.requires_grad and id(parameter) not in shared for parameter in parameters)
    if layer is None:
        return own
    affine = norm is None or getattr(norm, "weight", None) is not None and getattr(norm, "bias", None) is not None
    return own and affine and layer.channel_axis == 0 and not layer.weight_quantizer.frozen


def _collected(links: _Links, found: _Found) -> Iterator[ChannelGroup]:
    fixed, groups = links.fixed_roots(), dict[_Value, ChannelGroup]()
    for module, value in found.producers.items():
        if (root := links.root(value)) not in fixed:
            group = groups.setdefault(root, ChannelGroup())
            if isinstance(module, QATLayer):
                group.producers.append(module)
            else:
                group.norms.append(module)
    for layer, value in found.consumers.items():
        if (root := links.root(value)) in groups:
            groups[root].consumers.append(layer)
    for quantizer, value in found.quantizers.items():
        if (of_value := groups.get(links.root(value))) is not None:
            of_value.quantizers[quantizer] = found.axes[quantizer]
            if quantizer in found.clamped:
                of_value.ceiling = found.clamped[quantizer]
                of_value.clamped.append(quantizer)
    yield from groups.values()


def _is_consistent(group: ChannelGroup) -> bool:
    """Whether all its layers mean the same channels."""
    made = {len(module.weight) for module in (*group.producers, *group.norms)}  # type: ignore[arg-type]
    read = {channels_read(layer) for layer in group.consumers}
    return bool(group.consumers) and bool(group.quantizers) and len(made | read) == 1


def channels_read(layer: QATLayer) -> int:
    """How many channels the input of a layer has."""
    return int(layer.weight.shape[1]) * groups_of(layer)


def groups_of(layer: QATLayer) -> int:
    """Into how many groups its channels are divided; 1 of a linear layer."""
    arguments = layer.operation_args
    return int(arguments[-1]) if layer.weight.dim() > 2 and len(arguments) == 4 else 1
