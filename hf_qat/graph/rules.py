"""The table of operations: how each ATen op of a captured graph takes part in quantization.

A rule is added by adding a row, from outside by `register_rule`. Fixed ranges: sigmoid, and softmax over a short row,
lie in [0, 1], so their scale is 1 / 2**bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from hf_qat.errors import ConfigError
from hf_qat.graph.nodes import is_floating


aten = torch.ops.aten


class Kind(Enum):
    """What an operation is to the quantizers around it."""

    LAYER = "layer"  # has a weight; input and output quantized
    COMPUTE = "compute"  # makes new values; inputs and output quantized
    ACTIVATION = "activation"  # as COMPUTE, but no quantizer between it and the operation that feeds it
    JOIN = "join"  # its inputs share the quantizer of its output
    PASS = "pass"  # hands values on unchanged: the same quantizer holds
    FLOAT = "float"  # stays in float


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        kind: see `Kind`.
        non_negative: `True`: the output is ≥ 0 whatever comes in; `None`: it is if all inputs are.
        unit_range: the output lies in [0, 1]: fixed scale.
        clamp: name of the activation that a quantizer can compute by clamping.
        inputs: how many leading arguments are tensors to be quantized (a list counts as one).
        name: short name for quantizers of functional calls.
        is_activation_product: a product of two activations: some devices demand zero_point 0.
        is_softmax: what masks its input belongs to it.
    """

    kind: Kind
    name: str
    non_negative: bool | None = False
    unit_range: bool = False
    clamp: str | None = None
    inputs: int = 1
    is_activation_product: bool = False
    is_softmax: bool = False


#: The rule of an operation that has none.
FLOAT = Rule(Kind.FLOAT, "float")


def overloads(*packets: Any) -> list[Any]:
    """All overloads of operations such as `torch.ops.aten.add`."""
    return [getattr(packet, name) for packet in packets for name in packet.overloads()]


def _rows(kind: Kind, *packets: Any, **fields: Any) -> dict[Any, Rule]:
    """One rule for every overload of the given ops, named after each."""
    rows = {}
    for packet in packets:
        for overload in packet.overloads():
            rows[getattr(packet, overload)] = Rule(kind, packet.__name__, **fields)
    return rows


#: The table: ATen overload → rule. `ARGUMENT_RULES` has the operations whose arguments decide.
RULES: dict[Callable[..., Any], Rule] = {
    **_rows(Kind.LAYER, aten.conv1d, aten.conv2d, aten.conv3d, aten.linear),
    **_rows(Kind.LAYER, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    **_rows(Kind.COMPUTE, aten.matmul, aten.bmm, inputs=2, is_activation_product=True),
    **_rows(Kind.COMPUTE, aten.add, aten.mul, aten.maximum, aten.minimum, inputs=2, non_negative=None),
    **_rows(Kind.COMPUTE, aten.sub, aten.div, inputs=2),
    **_rows(Kind.COMPUTE, aten.rsub),
    **_rows(Kind.COMPUTE, aten.grid_sampler, aten.grid_sampler_2d, non_negative=None),
    **_rows(Kind.COMPUTE, aten.softmax, aten._softmax, unit_range=True, non_negative=True, is_softmax=True),
    **_rows(Kind.COMPUTE, aten.sigmoid, unit_range=True, non_negative=True),
    **_rows(Kind.COMPUTE, aten.layer_norm, aten.group_norm, aten.instance_norm, aten.batch_norm, aten.rms_norm),
    **_rows(Kind.COMPUTE, aten.gelu, aten.tanh, aten.neg, aten.elu, aten.celu, aten.selu),
    **_rows(Kind.COMPUTE, aten.abs, aten.square, aten.linalg_vector_norm, aten.softplus, non_negative=True),
    **_rows(Kind.COMPUTE, aten.mean, aten.sum, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, non_negative=None),
    **_rows(Kind.COMPUTE, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, non_negative=None),
    **_rows(Kind.COMPUTE, aten.adaptive_avg_pool3d, aten.upsample_trilinear3d, non_negative=None),
    **_rows(Kind.COMPUTE, aten.upsample_bilinear2d, aten.upsample_linear1d, non_negative=None),
    **_rows(Kind.COMPUTE, aten.upsample_bicubic2d),  # overshoots
    **_rows(Kind.ACTIVATION, aten.relu, non_negative=True, clamp="relu"),
    **_rows(Kind.ACTIVATION, aten.relu6, non_negative=True, clamp="relu6"),
    **_rows(Kind.ACTIVATION, aten.hardswish, aten.silu, aten.leaky_relu, aten.mish, aten.prelu),
    **_rows(Kind.ACTIVATION, aten.hardsigmoid, unit_range=True, non_negative=True),
    **_rows(Kind.ACTIVATION, aten.hardtanh),
    **_rows(Kind.JOIN, aten.cat, aten.concat, aten.stack, non_negative=None),
    **_rows(Kind.PASS, aten.view, aten.reshape, aten.flatten, aten.permute, aten.transpose, aten.unflatten),
    **_rows(Kind.PASS, aten._unsafe_view, aten.repeat_interleave, aten.dropout, aten.feature_dropout),
    **_rows(Kind.PASS, aten.reshape_as, aten.index, aten.gather, aten.amax, aten.amin, aten.nan_to_num),
    **_rows(Kind.PASS, aten.squeeze, aten.unsqueeze, aten.expand, aten.contiguous, aten.clone, aten.repeat, aten.t),
    **_rows(Kind.PASS, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.roll),
    **_rows(Kind.PASS, aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.upsample_nearest2d, aten.detach),
    **_rows(Kind.PASS, aten.upsample_nearest1d, aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d),
    **_rows(Kind.PASS, aten.upsample_nearest3d, aten._upsample_nearest_exact3d),
    **_rows(Kind.PASS, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.index_select, aten.flip),
    **_rows(Kind.PASS, aten.alias, aten.movedim, aten.swapaxes, aten.view_as, aten.expand_as, aten.im2col),
    **_rows(Kind.PASS, aten.adaptive_max_pool2d, aten.narrow, aten.lift_fresh_copy, aten.ravel),
    aten.max.dim: Rule(Kind.PASS, "max"),
    operator.getitem: Rule(Kind.PASS, "getitem"),
}

#: Reasons for operations that stay in float, for the report; any other op has no rule at all.
FLOAT_REASONS = {
    "where": "selects by a mask",
    "masked_fill": "selects by a mask",
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), "a table look-up"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "rounding its state would add up over the steps"),
    **dict.fromkeys(("topk", "sort"), "data-dependent selection"),
    "bilinear": "a product of three factors",
    **dict.fromkeys(("to", "type_as"), "makes numbers of integers"),
    "prod": "its range is too wide for 8 bits",
    "add_": "writes into a part of a tensor",
    "copy_": "writes into a part of a tensor",
    **dict.fromkeys(("sin", "cos"), "a position encoding"),
    **dict.fromkeys(("log", "exp", "sqrt", "rsqrt", "reciprocal", "pow"), "its range is too wide for 8 bits"),
}

#: Operations that make much of a small error, near 0 or at a high frequency, and the arithmetic before them that must
#: not round either.
ERROR_AMPLIFYING = frozenset({"log", "sqrt", "rsqrt", "reciprocal", "pow", "sin", "cos"})
BEFORE_ERROR_AMPLIFYING = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "abs", "mean", "sum", "clamp", "square"}
)

#: A constant up to this size that is added, or clamped to, keeps something away from 0.
LARGEST_EPSILON = 1e-3

#: The sizes of a tensor are not its values, and neither is a constant of that size.
SIZES = {
    aten.sym_size.int,
    getattr,
    *(
        getattr(aten, name).default
        for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
    ),
}


def register_rule(operation: Any, rule: Rule) -> None:
    """Add a row for every overload of an operation, such as `torch.ops.aten.cumsum`.

    Raises:
        ConfigError: the operation has a rule.
    """
    rows = dict.fromkeys(overloads(operation), rule)
    taken = [str(overload) for overload in rows if overload in RULES or overload in ARGUMENT_RULES]
    if taken:
        raise ConfigError(f"{taken[0]} has a rule already; a second one would change every model that uses it.")
    RULES.update(rows)


def rule_of(node: fx.Node) -> Rule:
    """The rule of a node; dropout modules pass, hardtanh(0, 6) is ReLU6, padding passes where it pads with 0."""
    if node.op == "call_module":
        return Rule(Kind.PASS, "dropout")
    if node.op != "call_function":
        return FLOAT
    target: Any = node.target
    by_arguments = ARGUMENT_RULES.get(target)
    return RULES.get(target, FLOAT) if by_arguments is None else by_arguments(node)


def _clamp_rule(node: fx.Node) -> Rule:
    """`clamp` and `hardtanh` with constant bounds are activations; from 0 upwards, ReLU and ReLU6."""
    bounds = list(node.args[1:3])
    low = bounds[0] if bounds else node.kwargs.get("min", node.kwargs.get("min_val"))
    high = bounds[1] if len(bounds) > 1 else node.kwargs.get("max", node.kwargs.get("max_val"))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return FLOAT
    clamp = {(0.0, None): "relu", (0.0, 6.0): "relu6"}.get((low, high))  # type: ignore[arg-type]
    non_negative = low is not None and float(low) >= 0  # type: ignore[arg-type]
    return Rule(Kind.ACTIVATION, "clamp", non_negative=non_negative, clamp=clamp)


def _pad_rule(node: fx.Node) -> Rule:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    if isinstance(mode, (int, float)):  # constant_pad_nd(x, pad, value)
        mode, value = "constant", mode
    return Rule(Kind.PASS, "pad") if mode != "constant" or value in (None, 0, 0.0) else Rule(Kind.COMPUTE, "pad")


def _cast_rule(node: fx.Node) -> Rule:
    real = is_floating(node) and isinstance(node.args[0], fx.Node) and is_floating(node.args[0])
    return Rule(Kind.PASS, "to") if real else FLOAT


#: ATen overload → what gives the rule of a call.
ARGUMENT_RULES: dict[Callable[..., Any], Callable[[fx.Node], Rule]] = {
    **dict.fromkeys(overloads(aten.hardtanh, aten.clamp, aten.clamp_min), _clamp_rule),
    **dict.fromkeys(overloads(aten.clamp_max), lambda node: Rule(Kind.ACTIVATION, "clamp")),
    **dict.fromkeys(overloads(aten.pad, aten.constant_pad_nd), _pad_rule),
    **dict.fromkeys(overloads(aten.to, aten._to_copy, aten.type_as), _cast_rule),
}


def is_scalar_multiple(node: fx.Node) -> bool:
    """`x * c` or `x / c` with a number: belongs to the product before it."""
    scaled = node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
    return node.op == "call_function" and scaled and not isinstance(node.args[1], fx.Node)


#: Convolutions whose weight is (C_in, C_out / groups, …).
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}


def weight_axis(node: fx.Node) -> int | None:
    """The axis of its weight that the output channels of a convolution or linear layer run along.

    `None` for a grouped transposed convolution, which has several output channels per slice of axis 1.
    """
    if node.target not in TRANSPOSED:
        return 0
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return 1 if groups == 1 else None


def tensor_inputs(node: fx.Node, rule: Rule) -> list[fx.Node]:
    """The arguments of `node` that `rule` wants quantized; a list argument is spread out."""
    found: list[fx.Node] = []
    for argument in node.args[: rule.inputs]:
        items = argument if isinstance(argument, (list, tuple)) else [argument]
        found += [item for item in items if isinstance(item, fx.Node) and is_floating(item)]
    return found
