"""Placement: decide by the target's rules where a tensor is rounded and how, and insert the quantizers there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.config.targets import Target, TensorScheme
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.passes.graph_facts import GraphFacts
from hf_qat.graph.passes.quantizer_names import quantizer_names
from hf_qat.graph.rules import Kind
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec


#: Largest value of ReLU6; a quantizer that computes it must not reach further.
RELU6_LIMIT = 6.0


@dataclass
class SharedQuantizer:
    """Sites of one graph that share a quantizer: one site, or a concatenation and what it joins."""

    name: str
    insertion_points: list[fx.Node]
    non_negative: bool
    spec: QuantizerSpec = field(default_factory=QuantizerSpec)


@dataclass
class Placement:
    """One graph with its groups; `group_of` leads from a site to its group."""

    analysis: GraphFacts
    groups: list[SharedQuantizer]
    group_of: dict[fx.Node, SharedQuantizer]

    def at(self, node: fx.Node) -> SharedQuantizer | None:
        """The group whose quantizer the value of `node` carries."""
        return self.group_of.get(self.analysis.source(node))

    def outputs(self) -> list[SharedQuantizer | None]:
        """For each output of the graph, the group that it carries."""
        output = next(node for node in self.analysis.nodes if node.op == "output")
        return [self.at(node) if isinstance(node, fx.Node) else None for node in output.args[0]]


def place(captured: dict[str, CapturedModule], config: QATConfig, excluded: Callable[[str], bool]) -> None:
    """Insert fake quantizers into the graphs of `captured`, in place; layers are fused already.

    Each captured module afterwards has `output_quantizers` (a path below it, or `None`, per output), `linked` (input
    position → (child, path) of the quantizer that the input carries already) and `float_operations`.
    """
    placements: dict[str, Placement] = {}
    for path, module in captured.items():
        linked = {
            position: group
            for position, (child, output) in module.links.items()
            if child in placements and (group := placements[child].outputs()[output]) is not None
        }
        module.linked = {p: (module.links[p][0], group.name) for p, group in linked.items()}
        non_negative = {position for position, group in linked.items() if group.non_negative}
        analysis = GraphFacts(module, path, excluded, non_negative)
        placements[path] = _group(analysis, set(linked))
        module.float_operations = analysis.float_operations()
    for placement in placements.values():
        _assign_specs(placement, config)
    _set_edges(placements, config)
    for path, module in captured.items():
        module.output_quantizers = [None if group is None else group.name for group in placements[path].outputs()]
        _insert(module, placements[path])


def _group(analysis: GraphFacts, linked: set[int]) -> Placement:
    """Find all insertion_points and join those that a concatenation makes share one quantizer."""
    insertion_points = dict.fromkeys(analysis.insertion_points())
    already = {analysis.placeholders[position] for position in linked}
    for node in analysis.nodes:
        for wanted in analysis.inputs_to_quantize(node):
            source = analysis.source(wanted)
            if source not in already and not (analysis.is_quantized(source) and source not in analysis.prelude):
                insertion_points.setdefault(source)
    ordered = [node for node in analysis.nodes if node in insertion_points]
    leader = _join(analysis, ordered)
    names = quantizer_names(analysis, ordered)
    groups: dict[fx.Node, SharedQuantizer] = {}
    for node in ordered:
        head = leader[node]
        group = groups.setdefault(head, SharedQuantizer(names[head], [], True))
        group.insertion_points.append(node)
        group.non_negative &= analysis.non_negative(node)
    return Placement(analysis, list(groups.values()), {node: groups[leader[node]] for node in ordered})


def _join(analysis: GraphFacts, insertion_points: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Site → leader of its group: the last concatenation that its value goes into, or itself."""
    leader = {node: node for node in insertion_points}
    for node in insertion_points:
        if analysis.rules[node].kind is not Kind.JOIN:
            continue
        joined = [s for s in map(analysis.source, analysis.inputs_to_quantize(node)) if s in leader]
        old = {leader[source] for source in joined}
        for member in [m for m in insertion_points if leader[m] in old]:
            leader[member] = leader[node]
    return leader


def _assign_specs(placement: Placement, config: QATConfig) -> None:
    analysis, target = placement.analysis, config.target_spec
    signed = _must_be_signed(placement, target)
    for group in placement.groups:
        owner = analysis.full_path(group.name.rpartition(".")[0])
        scheme = config.schemes_for(owner)[1]
        if target.symmetric_matmul and any(analysis.feeds_product(node) for node in group.insertion_points):
            scheme = replace(scheme, symmetric=True)
        unit_range = all(analysis.rules[node].unit_range for node in group.insertion_points)
        group.spec = activation_spec(scheme, group.non_negative, unit_range, group.name in signed)


def activation_spec(scheme: TensorScheme, non_negative: bool, unit_range: bool, signed: bool) -> QuantizerSpec:
    """The spec of an activation: zero_point 0 where nothing is negative, unsigned unless it must be signed.

    A range of [0, 1] has a fixed scale only if unsigned: 1/128 would round most of a long softmax to 0, so that there
    calibration chooses.
    """
    symmetric = scheme.symmetric or non_negative
    return QuantizerSpec(
        bits=scheme.bits,
        signed=(symmetric and not non_negative) or (scheme.symmetric and signed),
        symmetric=symmetric,
        non_negative=non_negative,
        power_of_two=scheme.power_of_two,
        learned=scheme.learned,
        observer=scheme.observer,
        fixed_scale=2.0**-scheme.bits if unit_range and not (scheme.symmetric and signed) else None,
    )


def weight_spec(scheme: TensorScheme, channel_axis: int) -> QuantizerSpec:
    """The spec of a weight: signed, symmetric, without the lowest code."""
    return QuantizerSpec(
        bits=scheme.bits,
        narrow_range=True,
        axis=channel_axis if scheme.per_channel else None,
        power_of_two=scheme.power_of_two,
        learned=scheme.learned,
        observer="minmax" if scheme.observer == "moving_average" else scheme.observer,
    )


def _must_be_signed(placement: Placement, target: Target) -> set[str]:
    """Names of the groups that are signed, or meet a signed one where the target wants one signedness."""
    signed = {group.name for group in placement.groups if not group.non_negative}
    meetings = list(_meetings(placement, target))
    changed = True
    while changed:
        changed = False
        for meeting in meetings:
            if meeting & signed and not meeting <= signed:
                signed |= meeting
                changed = True
    return signed


def _meetings(placement: Placement, target: Target) -> Iterator[set[str]]:
    """Names of the groups that must share signedness: an addition with its result; the two inputs of a product."""
    analysis = placement.analysis
    for node in analysis.nodes:
        if not analysis.is_quantized(node) or node in analysis.prelude:
            continue
        together = analysis.inputs_to_quantize(node)
        if target.one_type_where_tensors_meet and analysis.rules[node].name == "add":
            together = [*together, next(iter(node.users)) if analysis.fuses_into_next(node) else node]
        elif not (target.one_sign_in_products and analysis.rules[node].is_activation_product):
            continue
        yield {group.name for n in together if (group := placement.at(n)) is not None}


def _set_edges(placements: dict[str, Placement], config: QATConfig) -> None:
    """Image, input of the last layer and output keep `edge_bits`, where the target has a width of its own for them."""
    bits = config.target_spec.edge_bits
    if bits is None:
        return
    first, *_, last = (list(placements.values()) * 2)[: max(2, len(placements))]
    edges = [g for g in first.groups if any(n.op == "placeholder" for n in g.insertion_points)]
    edges += [group for group in last.outputs() if group is not None]
    layers = [n for n in last.analysis.nodes if last.analysis.rules[n].kind is Kind.LAYER]
    for node in layers[-1:]:
        source = last.analysis.source(node.args[0])
        carried = last.at(source) or _upstream(placements, last, source)
        edges += [carried] if carried is not None else []
    for group in edges:
        fixed = group.spec.fixed_scale and 2.0**-bits
        group.spec = replace(group.spec, bits=max(bits, group.spec.bits), fixed_scale=fixed)


def _upstream(placements: dict[str, Placement], placement: Placement, source: fx.Node) -> SharedQuantizer | None:
    """The group, in an earlier child, that a linked input carries."""
    if source not in placement.analysis.placeholders:
        return None
    link = placement.analysis.captured.linked.get(placement.analysis.placeholders.index(source))
    if link is None:
        return None
    return next((group for group in placements[link[0]].groups if group.name == link[1]), None)


def _insert(captured: CapturedModule, placement: Placement) -> None:
    """Add one `FakeQuantize` per group and a call after each insertion point; a clamp that it computes goes."""
    analysis = placement.analysis
    for group in placement.groups:
        clamps = {analysis.rules[node].clamp for node in group.insertion_points}
        absorbs_relu6 = clamps == {"relu6"} and not group.spec.power_of_two and group.spec.qmin == 0
        limit = RELU6_LIMIT / group.spec.qmax if absorbs_relu6 and group.spec.symmetric else None
        owner, _, name = group.name.rpartition(".")
        _add_module(captured.get_submodule(owner), name, FakeQuantize(group.spec, scale_limit=limit))
        for node in group.insertion_points:
            _call_quantizer(captured.graph, node, group.name, analysis.rules[node].clamp)
    captured.recompile()


def _add_module(owner: nn.Module, name: str, quantizer: FakeQuantize) -> None:
    owner.add_module(name, quantizer)


def _call_quantizer(graph: fx.Graph, node: fx.Node, name: str, clamp: str | None) -> None:
    argument = node if clamp is None else node.args[0]
    options: dict[str, Any] = {} if clamp is None else {"activation": clamp}
    # All inputs stay in front of the first operation.
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(inputs[-1] if node in inputs else node):
        call = graph.create_node("call_module", name, (argument,), options)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    if clamp is not None:
        graph.erase_node(node)
