"""How each quantizer in a graph rounds: by the scheme of its module, its sign, and what it meets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from hf_qat.config.targets import Target, TensorScheme
from hf_qat.graph.passes.graph_facts import GraphFacts
from hf_qat.graph.passes.sharing import Placement
from hf_qat.graph.passes.softmax import has_long_rows
from hf_qat.graph.plan import Plan
from hf_qat.quantization.spec import QuantizerSpec


#: A quantizer: path of the captured child, path of the quantizer below it.
QuantizerPath = tuple[str, str]

#: With so many bits, where calibration clips the data is as good as where training would.
FINE_BITS = 8


def decide_specs(placements: Mapping[str, Placement], plan: Plan) -> dict[QuantizerPath, QuantizerSpec]:
    """The spec of every quantizer."""
    symmetric, data = _symmetric(placements, plan), _of_data(placements, plan)
    wide = _wide(placements, plan)
    specs = {}
    for child, placement in placements.items():
        signed = _must_be_signed(placement, plan.target)
        for quantizer in placement.quantizers:
            module = plan.modules[placement.facts.full_path(quantizer.name.rpartition(".")[0])]
            weight = placement.facts.weights.get(quantizer.insertion_points[0])
            if weight is not None:
                specs[child, quantizer.name] = module.weight_spec(weight.axis)
                continue
            scheme = module.wide_activations if (child, quantizer.name) in wide else module.activations
            in_product = plan.target.symmetric_matmul and any(
                map(placement.facts.feeds_product, quantizer.insertion_points)
            )
            if in_product or (child, quantizer.name) in symmetric:
                scheme = replace(scheme, symmetric=True)
            if (child, quantizer.name) in data and scheme.bits >= FINE_BITS:
                scheme = replace(scheme, learned=False)
            facts, bits = placement.facts, scheme.bits
            unit_range = all(_has_fixed_range(facts, node, bits) for node in quantizer.insertion_points)
            specs[child, quantizer.name] = activation_spec(
                scheme, quantizer.non_negative, unit_range, quantizer.name in signed
            )
    return specs


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


def _symmetric(placements: Mapping[str, Placement], plan: Plan) -> set[QuantizerPath | None]:
    """The quantizers of what a restricted operation of the target reads and makes, and of what enters the model."""
    restrictions = plan.target.restrictions
    found: set[QuantizerPath | None] = set()
    for child, placement in placements.items():
        facts = placement.facts
        for node in facts.nodes:
            rule = facts.rules[node]
            transposed = restrictions.per_tensor_transposed and facts.is_transposed_layer(node)
            if rule.name in restrictions.symmetric_operations or transposed:
                found |= {_quantizer_of(placement, child, touched) for touched in (*node.all_input_nodes, node)}
            elif restrictions.symmetric_products and rule.is_activation_product:
                found.add(_quantizer_of(placement, child, node))
        if "select" in restrictions.symmetric_operations:
            cut = _cut_on_the_way(placement, placements)
            found |= {_quantizer_of(placement, child, facts.placeholders[position]) for position in cut}
        if restrictions.symmetric_input:
            found |= {_quantizer_of(placement, child, node) for node in _entering(placement, child, plan)}
    return found


def _of_data(placements: Mapping[str, Placement], plan: Plan) -> set[QuantizerPath]:
    """The quantizers of what enters the model and of nothing else.

    Training does not change the data, so it has no need to change their scales either; and the gradient of one would
    take that of the images: a tenth of a step of ResNet-18 on a CPU.
    """
    found = set()
    for child, placement in placements.items():
        entering = set(_entering(placement, child, plan))
        found |= {(child, q.name) for q in placement.quantizers if entering.issuperset(q.insertion_points)}
    return found


def _entering(placement: Placement, child: str, plan: Plan) -> list[fx.Node]:
    """The inputs of a child that come from outside the model."""
    placeholders = placement.facts.placeholders
    return [node for position, node in enumerate(placeholders) if (child, position) in plan.edges.inputs]


def _cut_on_the_way(placement: Placement, placements: Mapping[str, Placement]) -> list[int]:
    """Inputs of a child that are parts of what an earlier one returns: the model took `x[:, 0]` of it in between."""
    found = []
    for position, (other, output) in placement.facts.captured.producer_of_input.items():
        made = placements[other].facts.outputs()[output] if other in placements else None
        if made is not None and _numbers(made) != _numbers(placement.facts.placeholders[position]):
            found.append(position)
    return found


def _numbers(node: fx.Node) -> int:
    """How many numbers a value has for each image."""
    return int(node.meta["val"].shape[1:].numel())


def _has_fixed_range(facts: GraphFacts, node: fx.Node, bits: int) -> bool:
    """Whether all of [0, 1] is used: most of a long row of probabilities would be rounded to 0."""
    rule = facts.rules[node]
    return rule.unit_range and not has_long_rows(node, rule, bits)


def _wide(placements: Mapping[str, Placement], plan: Plan) -> set[QuantizerPath]:
    """The quantizers of what enters the model, of what goes into its last layers, of what it returns, and, where the
    target wants it, of what layer norms read.
    """
    found: set[QuantizerPath | None] = set()
    for child, placement in placements.items():
        facts = placement.facts
        edges: list[Any] = [*_entering(placement, child, plan)]
        edges += [node.args[0] for node, path in facts.layer_calls().items() if path in plan.edges.last_layers]
        edges += [node for position, node in enumerate(facts.outputs()) if (child, position) in plan.edges.outputs]
        if plan.target.restrictions.wide_norm_inputs:
            edges += [node.args[0] for node in facts.nodes if facts.rules[node].name == "layer_norm"]
        found |= {_quantizer_of(placement, child, node) for node in edges}
    return {quantizer for quantizer in found if quantizer is not None}


def _quantizer_of(placement: Placement, child: str, node: Any) -> QuantizerPath | None:
    """The quantizer that the value of `node` has passed last, perhaps in an earlier child; `None` for no node."""
    if not isinstance(node, fx.Node):
        return None
    quantizer = placement.at(node)
    if quantizer is not None:
        return child, quantizer.name
    source = placement.facts.source(node)
    if source not in placement.facts.placeholders:
        return None
    incoming = placement.incoming.get(placement.facts.placeholders.index(source))
    return None if incoming is None else (incoming[0], incoming[1].name)


def _must_be_signed(placement: Placement, target: Target) -> set[str]:
    """Names of the quantizers that are signed, or meet a signed one where the target wants one signedness."""
    signed = {quantizer.name for quantizer in placement.quantizers if not quantizer.non_negative}
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
    """Names of the quantizers that share signedness: of an addition and its result; of the inputs of a product."""
    facts = placement.facts
    for node in facts.nodes:
        if not facts.is_quantized(node) or node in facts.prelude:
            continue
        together = facts.inputs_to_quantize(node)
        if target.one_type_where_tensors_meet and facts.rules[node].name == "add":
            together = [*together, next(iter(node.users)) if facts.fuses_into_next(node) else node]
        elif not (target.one_sign_in_products and facts.rules[node].is_activation_product):
            continue
        yield {quantizer.name for n in together if (quantizer := placement.at(n)) is not None}
