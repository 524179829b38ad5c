"""What the placement of quantizers needs to know of a graph: roles of nodes, where a value comes from, its sign."""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch import Tensor, fx, nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import called_module, fetch, is_floating, module_path, operation_name, output_values
from hf_qat.graph.passes.decoded_boxes import decoded_boxes
from hf_qat.graph.passes.fuse import is_transposed
from hf_qat.graph.passes.softmax import find_preludes, long_results, masks_alone
from hf_qat.graph.passes.weights import Weight, find_weights
from hf_qat.graph.plan import ModulePlan, Plan, join_path
from hf_qat.graph.rules import (
    BEFORE_ERROR_AMPLIFYING,
    ERROR_AMPLIFYING,
    FLOAT,
    FLOAT_REASONS,
    LARGEST_EPSILON,
    SIZES,
    Kind,
    Rule,
    is_scalar_multiple,
    rule_of,
    tensor_inputs,
)
from hf_qat.quantization.freezable_norm import FreezableBatchNorm
from hf_qat.quantization.layers import QATLayer


#: Operations whose second argument says where the first one is read: of 256 steps, one is a tenth of a pixel and more.
TAKES_A_GRID = ("grid_sampler", "grid_sampler_2d")

#: Operations that add.
SUMS = ("add", "sub")

LAYER = Rule(Kind.LAYER, "layer")
NORM = Rule(Kind.COMPUTE, "batch_norm")


class GraphFacts:
    """Facts about one captured graph, computed once, before any quantizer is inserted.

    Args:
        captured: the module whose graph it is, fused already.
        path: where it stands in the model.
        plan: of the model.
        non_negative_inputs: positions of inputs that are known to be ≥ 0.
        outputs_read: positions of outputs that later parts of the model read.
    """

    def __init__(
        self,
        captured: CapturedModule,
        path: str,
        plan: Plan,
        non_negative_inputs: Collection[int],
        outputs_read: Collection[int],
    ) -> None:
        self.captured, self.path = captured, path
        self.nodes = list(captured.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self._plan = plan
        self.weights: dict[fx.Node, Weight] = {}  # known when the rules are
        self.static = self._static_nodes()
        self.rules = {node: self._rule(node) for node in self.nodes}
        self._error_amplifying = self._error_amplifying_nodes()
        self.rules |= dict.fromkeys(self._error_amplifying, FLOAT)
        self._epsilon_guards = self._epsilon_guard_nodes()
        self.rules |= dict.fromkeys(self._epsilon_guards, FLOAT)
        self._after_logarithm = self._after_logarithm_nodes()
        self.rules |= dict.fromkeys(self._after_logarithm, FLOAT)
        handed_on = {node for k, node in enumerate(self.outputs()) if node is not None and k in outputs_read}
        trained = self._trained_nodes()
        self._decoded = decoded_boxes(self.nodes, self.rules, self.source, self.static, trained, handed_on)
        self.rules |= dict.fromkeys(self._decoded, FLOAT)
        self.prelude = find_preludes(self.nodes, self.rules, self.static)
        self._returned = long_results(self.nodes, self.rules)
        self._masks = masks_alone(self.nodes, self.prelude, self.rules, self.static)
        self.rules |= dict.fromkeys(self._masks | self._returned, FLOAT)
        self.weights = find_weights(self.nodes, self.rules, self.static)
        self._non_negative = self._non_negative_nodes(non_negative_inputs)

    def full_path(self, path: str) -> str:
        """A path below the captured child, seen from the model."""
        return join_path(self.path, path)

    def owner(self, node: fx.Node) -> str:
        """Path from the model of the module that the node belongs to."""
        return self.full_path(module_path(node))

    def _owner_plan(self, node: fx.Node) -> ModulePlan:
        return self._plan.modules[self.owner(node)]

    def is_quantized(self, node: fx.Node) -> bool:
        """Whether the operation computes on codes."""
        return self.rules[node].kind in (Kind.LAYER, Kind.COMPUTE, Kind.ACTIVATION, Kind.JOIN)

    def fuses_into_next(self, node: fx.Node) -> bool:
        """Whether the single consumer (an activation, a factor) is computed before anything is rounded."""
        if self.rules[node].kind not in (Kind.LAYER, Kind.COMPUTE) or len(node.users) != 1:
            return False
        user = next(iter(node.users))
        follows = self._is_fused(user) or (is_scalar_multiple(user) and self.is_quantized(user))
        return follows and user.args[0] is node

    def _is_fused(self, node: fx.Node) -> bool:
        """Whether it is an activation that belongs to what it reads."""
        rule, apart = self.rules[node], self._plan.target.restrictions.pair_before_activation
        return rule.kind is Kind.ACTIVATION and not (apart and rule.clamp is None)

    def is_transposed_layer(self, node: fx.Node) -> bool:
        """Whether the node calls a transposed convolution."""
        called = called_module(self.captured, node)
        return isinstance(called, QATLayer) and is_transposed(called)

    def insertion_points(self) -> list[fx.Node]:
        """Operations whose result is rounded."""
        return [
            n for n in self.nodes if self.is_quantized(n) and n not in self.prelude and not self.fuses_into_next(n)
        ]

    def inputs_to_quantize(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of `node` that must be quantized for it to be computed on codes."""
        if not self.is_quantized(node) or node in self.prelude:
            return []
        inputs = tensor_inputs(node, self.rules[node])
        if self.rules[node].name == "div":
            inputs = [n for n in inputs if n is node.args[0] or n not in self.static]  # a small divisor would become 0
        return [n for n in inputs if self.source(n) not in self.prelude | self._epsilon_guards]

    def layer_calls(self) -> dict[fx.Node, str]:
        """The nodes that call a quantized layer → its path from the model."""
        return {node: self.owner(node) for node in self.nodes if self.rules[node].kind is Kind.LAYER}

    def outputs(self) -> list[fx.Node | None]:
        """What the graph returns, `None` where it is no node."""
        return [value if isinstance(value, fx.Node) else None for value in output_values(self.captured.graph)]

    def source(self, node: fx.Node) -> fx.Node:
        """Back through whatever hands its values on unchanged."""
        while self.rules[node].kind is Kind.PASS and isinstance(node.args[0], fx.Node) and node not in self.weights:
            if node.target is operator.getitem and self.rules[node.args[0]].kind is not Kind.PASS:
                break  # one of several results of an operation that makes new values
            node = node.args[0]
        return node

    def non_negative(self, node: fx.Node) -> bool:
        """Whether the value is known to be ≥ 0."""
        return node in self._non_negative

    def feeds_product(self, node: fx.Node) -> bool:
        """Whether the value reaches, unchanged, a product of two activations."""
        stack, seen = [node], set()
        while stack:
            for user in stack.pop().users:
                if self.rules[user].is_activation_product:
                    return True
                if self.rules[user].kind is Kind.PASS and user not in seen:
                    seen.add(user)
                    stack.append(user)
        return False

    def float_operations(self) -> list[tuple[str, str, str]]:
        """`(module path, operation, reason)` of every data-dependent floating-point operation left in float."""
        rows = []
        for node in self.nodes:
            data = node.op == "call_function" and node not in self.static and _makes_numbers(node)
            in_float = self.rules[node].kind is Kind.FLOAT or node in self.prelude
            if data and in_float and not self._fuses_into_division(node):
                rows.append((self.owner(node), str(node.target), self._reason(node)))
        return rows

    def _reason(self, node: fx.Node) -> str:
        if node in self.prelude or node in self._masks:
            return "belongs to the softmax after it"
        if node in self._returned:
            return "many probabilities, which are returned or compared"
        if node in self._error_amplifying:
            return "belongs to the logarithm, root, power, sine or sampling grid after it"
        if node in self._epsilon_guards:
            return "keeps a divisor away from 0"
        if node in self._after_logarithm:
            return "belongs to the logarithm before it"
        if node in self._decoded:
            return "decodes boxes behind the last layer"
        plan = self._owner_plan(node)
        return plan.why if plan.excluded else FLOAT_REASONS.get(operation_name(node), "no rule")

    def _rule(self, node: fx.Node) -> Rule:
        called = called_module(self.captured, node)
        if isinstance(called, QATLayer):
            return LAYER
        if isinstance(called, FreezableBatchNorm):
            return FLOAT if self._owner_plan(node).excluded else NORM
        rule = rule_of(node)
        if rule.kind is Kind.LAYER:
            # Its weight is no layer's own, and perhaps no weight at all: see `find_weights`.
            rule = Rule(Kind.COMPUTE, rule.name, inputs=2)
        if rule.kind in (Kind.FLOAT, Kind.PASS):
            return rule
        on_data = is_floating(node) and node not in self.static
        return rule if on_data and not self._owner_plan(node).excluded else FLOAT

    def _static_nodes(self) -> set[fx.Node]:
        """Nodes that depend on parameters and sizes, not on data."""
        static: set[fx.Node] = set()
        for node in self.nodes:
            constant = node.op == "get_attr" or (node.op == "call_function" and node.target in SIZES)
            if constant or (node.op == "call_function" and all(n in static for n in node.all_input_nodes)):
                static.add(node)
        return static

    def _trained_nodes(self) -> set[fx.Node]:
        """Of the static nodes, those that depend on parameters."""
        trained: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr" and isinstance(fetch(self.captured, str(node.target)), nn.Parameter):
                trained.add(node)
            elif node in self.static and not trained.isdisjoint(node.all_input_nodes):
                trained.add(node)
        return trained

    def _error_amplifying_nodes(self) -> set[fx.Node]:
        """Nodes that feed nothing but logarithms, roots, powers and sampling grids, through simple arithmetic."""
        amplified: set[fx.Node] = set()
        for node in reversed(self.nodes):
            after = amplified | {user for user in node.users if _amplifies(user, node)}
            feeds = bool(node.users) and all(user in after for user in node.users)
            if feeds and (self.rules[node].name in BEFORE_ERROR_AMPLIFYING or self.rules[node].kind is Kind.PASS):
                amplified.add(node)
        return {node for node in amplified if self.rules[node].kind is not Kind.PASS}

    def _epsilon_guard_nodes(self) -> set[fx.Node]:
        """Divisors, and sums with an epsilon: rounding could make them 0, and a quotient infinite."""
        guards: set[fx.Node] = set()
        for node in self.nodes:
            rule = self.rules[node]
            if rule.name in ("add", "clamp") and self.is_quantized(node) and any(map(_is_epsilon, node.args[1:])):
                guards.add(node)
            if rule.name == "div" and self.is_quantized(node) and isinstance(node.args[1], fx.Node):
                divisor = self.source(node.args[1])
                if self.rules[divisor].name in BEFORE_ERROR_AMPLIFYING and self.is_quantized(divisor):
                    guards.add(divisor)
        return guards

    def _after_logarithm_nodes(self) -> set[fx.Node]:
        """Sums with a logarithm, the sigmoid of them, and what joins nothing else: how detectors refine boxes.

        Logarithms of what is near 0 make the range so wide that one of 256 steps moves a box by two percent of the
        image.
        """
        found: set[fx.Node] = set()
        for node in self.nodes:
            sources = {self.source(given) for given in node.all_input_nodes}
            sums = {source for source in sources & found if self.rules[source].name in SUMS}
            wide = sums or any(operation_name(source) == "log" for source in sources)
            refines = bool(wide) and self.rules[node].name in (*SUMS, "sigmoid") and self.is_quantized(node)
            if refines or (self.rules[node].kind is Kind.JOIN and sources <= found):
                found.add(node)
        return found

    def _fuses_into_division(self, node: fx.Node) -> bool:
        """Whether an epsilon is added to a divisor on the way into the division."""
        alone = node in self._epsilon_guards and len(node.users) == 1 and len(node.all_input_nodes) == 1
        return alone and operation_name(next(iter(node.users))) == "div"

    def _non_negative_nodes(self, inputs: Collection[int]) -> set[fx.Node]:
        known = {self.placeholders[position] for position in inputs}
        for node in self.nodes:
            rule = self.rules[node]
            inherits = rule.kind is Kind.PASS or rule.non_negative is None
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            inherited = inherits and bool(tensors) and all(n in known for n in tensors)
            if rule.non_negative or (inherited and all(number >= 0 for number in _operands(node, rule))):
                known.add(node)
        return known


def _amplifies(user: fx.Node, node: fx.Node) -> bool:
    """Whether a small error of `node` is a large one of what `user` makes of it."""
    name = operation_name(user)
    return name in ERROR_AMPLIFYING or (name in TAKES_A_GRID and node is user.args[1] and node is not user.args[0])


def _makes_numbers(node: fx.Node) -> bool:
    """Whether the value, or one of several, is a tensor of real numbers."""
    values = node.meta.get("val")
    several = values if isinstance(values, (list, tuple)) else [values]
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in several)


def _operands(node: fx.Node, rule: Rule) -> list[float]:
    """The numbers that an operation of two operands computes with: `x + 1`, `x * 2`, `add(x, y, alpha=2)`."""
    values = (*node.args[1:], *node.kwargs.values()) if rule.inputs == 2 else ()
    return [value for value in values if isinstance(value, (int, float))]


def _is_epsilon(argument: object) -> bool:
    return isinstance(argument, float) and 0.0 < argument <= LARGEST_EPSILON
