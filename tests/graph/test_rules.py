from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from hf_qat.errors import ConfigError
from hf_qat.graph.rules import RULES, Kind, Rule, is_scalar_multiple, register_rule, rule_of, tensor_inputs


aten = torch.ops.aten


def data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


GRID = data(2, 5, 5, 2).tanh()
IMAGE, OTHER, TOKENS = data(2, 4, 6, 6), data(2, 4, 6, 6).flip(0), data(2, 4, 6)

#: Row → a call of it: inputs, and a function of them. Every row but the layers has one, so a new row needs one here.
CALLS = {
    "matmul": ((IMAGE, OTHER), aten.matmul),
    "bmm": ((TOKENS, data(2, 6, 3)), aten.bmm),
    "add": ((IMAGE, OTHER), aten.add),
    "mul": ((IMAGE, OTHER), aten.mul),
    "maximum": ((IMAGE, OTHER), aten.maximum),
    "minimum": ((IMAGE, OTHER), aten.minimum),
    "sub": ((IMAGE, OTHER), aten.sub),
    "div": ((IMAGE, OTHER), aten.div),
    "rsub": ((IMAGE,), lambda x: aten.rsub(x, 1.0)),
    "prelu": ((IMAGE,), lambda x: aten.prelu(x, torch.full((4,), 0.25))),
    "sum": ((IMAGE,), lambda x: aten.sum(x, [2, 3])),
    "grid_sampler": ((IMAGE,), lambda x: aten.grid_sampler(x, GRID, 0, 0, False)),
    "grid_sampler_2d": ((IMAGE,), lambda x: aten.grid_sampler_2d(x, GRID, 0, 0, False)),
    "softmax": ((IMAGE,), lambda x: aten.softmax(x, -1)),
    "_softmax": ((IMAGE,), lambda x: aten._softmax(x, -1, False)),
    "sigmoid": ((IMAGE,), aten.sigmoid),
    "layer_norm": ((TOKENS,), lambda x: aten.layer_norm(x, [6])),
    "group_norm": ((IMAGE,), lambda x: aten.group_norm(x, 2)),
    "instance_norm": ((IMAGE,), lambda x: aten.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False)),
    "batch_norm": (
        (IMAGE,),
        lambda x: aten.batch_norm(x, None, None, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5, False),
    ),
    "rms_norm": ((TOKENS,), lambda x: aten.rms_norm(x, [6])),
    "gelu": ((IMAGE,), aten.gelu),
    "tanh": ((IMAGE,), aten.tanh),
    "neg": ((IMAGE,), aten.neg),
    "elu": ((IMAGE,), aten.elu),
    "celu": ((IMAGE,), aten.celu),
    "selu": ((IMAGE,), aten.selu),
    "abs": ((IMAGE,), aten.abs),
    "square": ((IMAGE,), aten.square),
    "softplus": ((IMAGE,), aten.softplus),
    "linalg_vector_norm": ((IMAGE,), lambda x: aten.linalg_vector_norm(x, 2, [1])),
    "mean": ((IMAGE,), lambda x: aten.mean(x, [2, 3])),
    "avg_pool1d": ((TOKENS,), lambda x: aten.avg_pool1d(x, [2])),
    "avg_pool2d": ((IMAGE,), lambda x: aten.avg_pool2d(x, [2, 2])),
    "avg_pool3d": ((IMAGE,), lambda x: aten.avg_pool3d(x, [2, 2, 2])),
    "adaptive_avg_pool1d": ((TOKENS,), lambda x: aten.adaptive_avg_pool1d(x, [1])),
    "adaptive_avg_pool2d": ((IMAGE,), lambda x: aten.adaptive_avg_pool2d(x, [1, 1])),
    "adaptive_avg_pool3d": ((IMAGE,), lambda x: aten.adaptive_avg_pool3d(x, [1, 1, 1])),
    "upsample_trilinear3d": ((IMAGE[None],), lambda x: aten.upsample_trilinear3d(x, [5, 9, 9], False)),
    "upsample_bilinear2d": ((IMAGE,), lambda x: aten.upsample_bilinear2d(x, [9, 9], False)),
    "upsample_bicubic2d": ((IMAGE,), lambda x: aten.upsample_bicubic2d(x, [9, 9], False)),
    "upsample_linear1d": ((TOKENS,), lambda x: aten.upsample_linear1d(x, [9], False)),
    "relu": ((IMAGE,), aten.relu),
    "relu6": ((IMAGE,), aten.relu6),
    "hardswish": ((IMAGE,), aten.hardswish),
    "silu": ((IMAGE,), aten.silu),
    "leaky_relu": ((IMAGE,), aten.leaky_relu),
    "mish": ((IMAGE,), aten.mish),
    "hardsigmoid": ((IMAGE,), aten.hardsigmoid),
    "hardtanh": ((IMAGE,), aten.hardtanh),
    "cat": ((IMAGE, OTHER), lambda x, y: aten.cat([x, y], 1)),
    "concat": ((IMAGE, OTHER), lambda x, y: aten.concat([x, y], 1)),
    "stack": ((IMAGE, OTHER), lambda x, y: aten.stack([x, y], 1)),
    "view": ((IMAGE,), lambda x: aten.view(x, [2, -1])),
    "reshape": ((IMAGE,), lambda x: aten.reshape(x, [2, -1])),
    "reshape_as": ((IMAGE,), lambda x: aten.reshape_as(x, torch.empty(2, 144))),
    "flatten": ((IMAGE,), lambda x: aten.flatten(x, 2)),
    "permute": ((IMAGE,), lambda x: aten.permute(x, [0, 2, 3, 1])),
    "transpose": ((IMAGE,), lambda x: aten.transpose(x, 1, 2)),
    "unflatten": ((IMAGE,), lambda x: aten.unflatten(x, 1, [2, 2])),
    "amax": ((IMAGE,), lambda x: aten.amax(x, [2])),
    "amin": ((IMAGE,), lambda x: aten.amin(x, [2])),
    "index": ((IMAGE,), lambda x: aten.index(x, [torch.tensor([1, 0])])),
    "gather": ((IMAGE,), lambda x: aten.gather(x, 1, torch.zeros(2, 1, 6, 6, dtype=torch.long))),
    "nan_to_num": ((IMAGE,), aten.nan_to_num),
    "max": ((IMAGE,), lambda x: aten.max.dim(x, 2)[0]),
    "squeeze": ((IMAGE,), lambda x: aten.squeeze(x)),
    "unsqueeze": ((IMAGE,), lambda x: aten.unsqueeze(x, 1)),
    "expand": ((IMAGE,), lambda x: aten.expand(x, [3, 2, 4, 6, 6])),
    "expand_as": ((IMAGE,), lambda x: aten.expand_as(x, torch.empty(3, 2, 4, 6, 6))),
    "contiguous": ((IMAGE,), aten.contiguous),
    "clone": ((IMAGE,), aten.clone),
    "repeat": ((IMAGE,), lambda x: aten.repeat(x, [2, 1, 1, 1])),
    "t": ((IMAGE[0, 0],), aten.t),
    "slice": ((IMAGE,), lambda x: aten.slice(x, 1, 1, 3)),
    "select": ((IMAGE,), lambda x: aten.select(x, 1, 0)),
    "split": ((IMAGE,), lambda x: aten.split(x, 2, 1)[0]),
    "split_with_sizes": ((IMAGE,), lambda x: aten.split_with_sizes(x, [1, 3], 1)[1]),
    "chunk": ((IMAGE,), lambda x: aten.chunk(x, 2, 1)[1]),
    "unbind": ((IMAGE,), lambda x: aten.unbind(x, 1)[2]),
    "roll": ((IMAGE,), lambda x: aten.roll(x, [1, 2], [2, 3])),
    "max_pool1d": ((TOKENS,), lambda x: aten.max_pool1d(x, [3], [2], [1])),
    "max_pool2d": ((IMAGE,), lambda x: aten.max_pool2d(x, [3, 3], [2, 2], [1, 1])),
    "max_pool3d": ((IMAGE,), lambda x: aten.max_pool3d(x, [3, 3, 3], [2, 2, 2], [1, 1, 1])),
    "adaptive_max_pool2d": ((IMAGE,), lambda x: aten.adaptive_max_pool2d(x, [2, 2])[0]),
    "upsample_nearest1d": ((TOKENS,), lambda x: aten.upsample_nearest1d(x, [9])),
    "upsample_nearest2d": ((IMAGE,), lambda x: aten.upsample_nearest2d(x, [9, 9])),
    "upsample_nearest3d": ((IMAGE[None],), lambda x: aten.upsample_nearest3d(x, [5, 9, 9])),
    "_upsample_nearest_exact1d": ((TOKENS,), lambda x: aten._upsample_nearest_exact1d(x, [9])),
    "_upsample_nearest_exact2d": ((IMAGE,), lambda x: aten._upsample_nearest_exact2d(x, [9, 9])),
    "_upsample_nearest_exact3d": ((IMAGE[None],), lambda x: aten._upsample_nearest_exact3d(x, [5, 9, 9])),
    "detach": ((IMAGE,), aten.detach),
    "_unsafe_view": ((IMAGE,), lambda x: aten._unsafe_view(x, [2, 144])),
    "repeat_interleave": ((IMAGE,), lambda x: aten.repeat_interleave(x, 2, 0)),
    "dropout": ((IMAGE,), lambda x: aten.dropout(x, 0.5, False)),
    "feature_dropout": ((IMAGE,), lambda x: aten.feature_dropout(x, 0.5, False)),
    "pixel_shuffle": ((IMAGE,), lambda x: aten.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ((IMAGE,), lambda x: aten.pixel_unshuffle(x, 2)),
    "channel_shuffle": ((IMAGE,), lambda x: aten.channel_shuffle(x, 2)),
    "index_select": ((IMAGE,), lambda x: aten.index_select(x, 1, torch.tensor([2, 0]))),
    "flip": ((IMAGE,), lambda x: aten.flip(x, [3])),
    "alias": ((IMAGE,), aten.alias),
    "movedim": ((IMAGE,), lambda x: aten.movedim(x, 1, 2)),
    "swapaxes": ((IMAGE,), lambda x: aten.swapaxes(x, 1, 2)),
    "view_as": ((IMAGE,), lambda x: aten.view_as(x, torch.empty(2, 144))),
    "im2col": ((IMAGE,), lambda x: aten.im2col(x, [2, 2], [1, 1], [1, 1], [1, 1])),
    "narrow": ((IMAGE,), lambda x: aten.narrow(x, 1, 1, 2)),
    "lift_fresh_copy": ((IMAGE,), aten.lift_fresh_copy),
    "ravel": ((IMAGE,), aten.ravel),
    "getitem": ((IMAGE,), lambda x: operator.getitem([x], 0)),
}

ROWS = {rule.name: rule for rule in RULES.values() if rule.kind is not Kind.LAYER}


def rows(condition) -> list[str]:
    return [name for name, rule in ROWS.items() if condition(rule) and name in CALLS]


def test_every_row_has_a_call_here():
    assert set(ROWS) == set(CALLS)


@pytest.mark.parametrize("name", rows(lambda rule: rule.kind in (Kind.PASS, Kind.JOIN)))
def test_what_passes_or_joins_makes_no_new_value(name):
    inputs, call = CALLS[name]
    known = {0.0} | {value for x in inputs for value in x.flatten().tolist()}
    assert set(call(*inputs).flatten().tolist()) <= known


#: These give back values of their inputs, but of two tensors, and so with two scales.
CHOOSING = ("maximum", "minimum")


@pytest.mark.parametrize("name", [n for n in rows(lambda rule: rule.kind is Kind.COMPUTE) if n not in CHOOSING])
def test_what_computes_makes_new_values(name):
    inputs, call = CALLS[name]
    result = call(*inputs)
    assert not set(result.flatten().tolist()) <= {value for x in inputs for value in x.flatten().tolist()}


@pytest.mark.parametrize("name", CHOOSING)
def test_what_chooses_between_two_tensors_takes_values_of_both_and_is_no_passing_on(name):
    (x, y), call = CALLS[name]
    result = call(x, y)
    assert torch.equal(result, torch.where((x > y) == (name == "maximum"), x, y))
    assert 0 < (result == x).float().mean() < 1
    assert ROWS[name].kind is Kind.COMPUTE and ROWS[name].inputs == 2


@pytest.mark.parametrize("name", rows(lambda rule: rule.non_negative is True))
def test_what_is_said_to_be_non_negative_is(name):
    inputs, call = CALLS[name]
    assert min(x.min() for x in inputs) < -3
    assert call(*inputs).min() >= 0


@pytest.mark.parametrize("name", rows(lambda rule: rule.non_negative is None or rule.kind is Kind.PASS))
def test_what_is_said_to_keep_the_sign_does(name):
    inputs, call = CALLS[name]
    # Ones and zeros make an interpolation that overshoots go below zero.
    for positive in ([x.abs() for x in inputs], [(x > 0).float() for x in inputs]):
        assert call(*positive).min() >= 0


@pytest.mark.parametrize("name", rows(lambda rule: rule.unit_range))
def test_what_is_said_to_lie_between_0_and_1_does(name):
    inputs, call = CALLS[name]
    result = call(*(x * 100 for x in inputs))
    assert 0 <= result.min() < 0.01 and 0.99 < result.max() <= 1


@pytest.mark.parametrize("name", rows(lambda rule: rule.kind is not Kind.FLOAT and rule.kind is not Kind.PASS))
def test_the_number_of_inputs_is_that_of_the_call(name):
    inputs, _ = CALLS[name]
    assert ROWS[name].inputs == (1 if ROWS[name].kind is Kind.JOIN else len(inputs))


def node_of(function, *arguments, **keywords) -> fx.Node:
    """A call of `function` with a float tensor as its first argument."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = IMAGE
    node = graph.call_function(function, (x, *arguments), keywords)
    node.meta["val"] = IMAGE
    return node


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "clamp"),
    [
        (aten.relu.default, (), {}, "relu"),
        (aten.relu6.default, (), {}, "relu6"),
        (aten.hardtanh.default, (0.0, 6.0), {}, "relu6"),
        (aten.hardtanh.default, (0, 6), {}, "relu6"),
        (aten.hardtanh.default, (), {"min_val": 0.0, "max_val": 6.0}, "relu6"),
        (aten.hardtanh.default, (), {}, None),
        (aten.clamp.default, (0,), {}, "relu"),
        (aten.clamp.default, (0.0, 6.0), {}, "relu6"),
        (aten.clamp.default, (0.0, 4.0), {}, None),
        (aten.clamp.default, (-1.0, 1.0), {}, None),
        (aten.clamp.default, (), {"max": 6.0}, None),
        (aten.clamp_min.default, (0.0,), {}, "relu"),
        (aten.clamp_min.default, (1e-6,), {}, None),
    ],
)
def test_a_clamp_is_the_activation_that_it_computes(function, arguments, keywords, clamp):
    rule = rule_of(node_of(function, *arguments, **keywords))
    assert rule.kind is Kind.ACTIVATION and rule.clamp == clamp
    x = torch.linspace(-10, 10, 101)
    result = function(x, *arguments, **keywords)
    if clamp is not None:
        assert torch.equal(result, {"relu": nn.functional.relu, "relu6": nn.functional.relu6}[clamp](x))
    assert rule.non_negative == bool(result.min() >= 0)


def test_a_clamp_by_a_tensor_stays_float():
    node = node_of(aten.clamp.default)
    node.args = (node.args[0], node.args[0], None)
    assert rule_of(node).kind is Kind.FLOAT


@pytest.mark.parametrize(
    ("function", "arguments", "kind"),
    [
        (aten.pad.default, ([1, 1],), Kind.PASS),
        (aten.pad.default, ([1, 1], "constant", 0.0), Kind.PASS),
        (aten.pad.default, ([1, 1], "constant", 2.0), Kind.COMPUTE),
        (aten.pad.default, ([1, 1, 1, 1], "reflect"), Kind.PASS),
        (aten.constant_pad_nd.default, ([1, 1],), Kind.PASS),
        (aten.constant_pad_nd.default, ([1, 1], 0), Kind.PASS),
        (aten.constant_pad_nd.default, ([1, 1], -1.0), Kind.COMPUTE),
    ],
)
def test_padding_passes_where_it_adds_no_value_but_0(function, arguments, kind):
    assert rule_of(node_of(function, *arguments)).kind is kind
    added = set(function(IMAGE, *arguments).flatten().tolist()) - set(IMAGE.flatten().tolist())
    assert (added <= {0.0}) == (kind is Kind.PASS)


def test_a_cast_passes_only_between_real_numbers():
    assert rule_of(node_of(aten.to.dtype, torch.float32)).kind is Kind.PASS
    assert rule_of(node_of(aten.type_as.default, IMAGE)).kind is Kind.PASS
    node = node_of(aten.to.dtype, torch.int64)
    node.meta["val"] = IMAGE.long()
    assert rule_of(node).kind is Kind.FLOAT


def test_an_unknown_operation_stays_float():
    assert rule_of(node_of(aten.cumsum.default, 1)).kind is Kind.FLOAT


def test_a_factor_is_a_number_behind_the_tensor():
    assert is_scalar_multiple(node_of(aten.mul.Tensor, 0.5))
    assert is_scalar_multiple(node_of(aten.div.Tensor, 8.0))
    assert not is_scalar_multiple(node_of(aten.add.Tensor, 0.5))
    node = node_of(aten.mul.Tensor)
    node.args = (node.args[0], node.args[0])
    assert not is_scalar_multiple(node)


def test_the_tensors_of_a_list_are_inputs_and_integers_are_not():
    graph = fx.Graph()
    x, y, ids = graph.placeholder("x"), graph.placeholder("y"), graph.placeholder("ids")
    x.meta["val"] = y.meta["val"] = IMAGE
    ids.meta["val"] = IMAGE.long()
    cat = graph.call_function(aten.cat.default, ([x, y, ids], 1))
    assert tensor_inputs(cat, Rule(Kind.JOIN, "cat")) == [x, y]
    add = graph.call_function(aten.add.Tensor, (x, 1.0))
    assert tensor_inputs(add, Rule(Kind.COMPUTE, "add", inputs=2)) == [x]


@pytest.mark.parametrize("operation", [aten.relu, aten.clamp, aten.conv2d], ids=str)
def test_an_operation_has_one_rule(operation):
    before = dict(RULES)
    with pytest.raises(ConfigError, match="has a rule already"):
        register_rule(operation, Rule(Kind.COMPUTE, "mine"))
    assert before == RULES
