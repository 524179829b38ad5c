"""Rewrite captured graphs into the operations that can be quantized and exported, without changing what they compute.

Fused attention becomes its two products and the softmax between them, unfolding without overlap becomes a permutation,
and batch norms in disguise become batch norms that fusion can fold. A pattern of one's own is a function under
`@register_rewrite(operation)`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_qat.graph.capture.views import replaced_part
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import MODULE_PATH, eliminate_dead_code, emitter, module_path, replace_node
from hf_qat.graph.plan import join_path


aten = torch.ops.aten

#: Buffers of a batch norm that is frozen for good (DETR's), a class of the model's own.
STATISTICS = ("weight", "bias", "running_mean", "running_var")


#: Looks at a node of the graph of a captured child, and rewrites the pattern that ends in it if it knows it.
Rewrite = Callable[[CapturedModule, fx.Node], None]

#: ATen overload that a pattern ends in → its rewrites, each of which leaves alone what it does not know.
REWRITES: dict[Any, list[Rewrite]] = {}


def register_rewrite(operation: Any) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite for the patterns that end in `operation`, such as `torch.ops.aten.mul.Tensor`.

    It gets the captured child and the node; `hf_qat.graph.nodes` has what it needs to insert and to replace nodes.
    """

    def register(function: Rewrite) -> Rewrite:
        REWRITES.setdefault(operation, []).append(function)
        return function

    return register


def rewrite(captured: Mapping[str, CapturedModule]) -> None:
    """Apply all rewrites to the graphs of `captured`, in place, before anything is fused."""
    for module in captured.values():
        for way in module.graphs:
            for node in list(way.graph.nodes):
                for function in REWRITES.get(node.target, []):
                    if node.users:  # otherwise it is dead, or has just been replaced
                        function(module, node)
            eliminate_dead_code(way.graph)
        module.recompile()


@register_rewrite(aten.scaled_dot_product_attention.default)
def _expand_attention(captured: CapturedModule, node: fx.Node) -> None:
    """`scaled_dot_product_attention(q, k, v, mask)` → softmax(q kᵀ · scale + mask) v.

    A mask of truth values says which keys a query sees; one that sees none gets zeros. Of grouped queries
    (`enable_gqa`), each group reads the same keys and values.
    """
    given, emit = _arguments(node), emitter(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    sizes = [_value(query).shape[-2], _value(key).shape[-2]]
    if given.get("is_causal") and not all(isinstance(n, int) for n in sizes):
        return
    if given.get("enable_gqa"):
        key, value = (_repeat_heads(emit, x, int(_value(query).shape[-3])) for x in (key, value))
    scale = given.get("scale")
    scores = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -2, -1))
    scores = emit(aten.mul.Tensor, scores, 1 / math.sqrt(int(_value(query).shape[-1])) if scale is None else scale)
    mask, seeing = given.get("attn_mask"), None
    if given.get("is_causal"):
        seen = emit(aten.tril.default, emit(aten.new_ones.default, scores, sizes, dtype=torch.bool))
        scores = emit(aten.where.ScalarOther, seen, scores, -math.inf)
    elif mask is not None and _value(mask).dtype == torch.bool:
        seeing = emit(aten.any.dim, mask, -1, True)
        seen = emit(aten.logical_or.default, mask, emit(aten.logical_not.default, seeing))  # no row without a number
        scores = emit(aten.where.ScalarOther, seen, scores, -math.inf)
    elif mask is not None:
        scores = emit(aten.add.Tensor, scores, mask)
    attention = emit(aten.softmax.int, scores, -1)
    if given.get("dropout_p"):
        attention = emit(aten.dropout.default, attention, given["dropout_p"], True)
    product = emit(aten.matmul.default, attention, value)
    replace_node(node, product if seeing is None else emit(aten.where.ScalarOther, seeing, product, 0.0))


def _repeat_heads(emit: Callable[..., fx.Node], x: Any, heads: int) -> Any:
    """(…, G, S, E) → (…, heads, S, E): each of the G heads as often as it takes, one after the other."""
    groups = int(_value(x).shape[-3])
    sizes = [-1] * (_value(x).dim() - 3) + [groups, heads // groups, -1, -1]
    return emit(aten.flatten.using_ints, emit(aten.expand.default, emit(aten.unsqueeze.default, x, -3), sizes), -4, -3)


@register_rewrite(aten.baddbmm.default)
def _split_baddbmm(captured: CapturedModule, node: fx.Node) -> None:
    """`baddbmm(mask, a, b)`, as `nn.MultiheadAttention` computes masked scores → a b + mask."""
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return
    emit = emitter(node)
    replace_node(node, emit(aten.add.Tensor, emit(aten.bmm.default, *node.args[1:]), node.args[0]))


@register_rewrite(aten.avg_pool2d.default)
@register_rewrite(aten.avg_pool3d.default)
def _divide_by_window(captured: CapturedModule, node: fx.Node) -> None:
    """Average pooling with a divisor of its own, which ONNX has not → the mean of each window times a constant."""
    given = _arguments(node)
    divisor = given.get("divisor_override")
    if divisor is None:
        return
    target: Any = node.target
    x, axes, emit = node.args[0], 2 if target is aten.avg_pool2d.default else 3, emitter(node)
    kernel, stride, padding = (_sizes(given.get(name), axes) for name in ("kernel_size", "stride", "padding"))
    stride, padding = stride or kernel, padding or [0] * axes
    sizes = zip(_value(x).shape[-axes:], _value(node).shape[-axes:], kernel, stride, padding, strict=True)
    # What lies beyond the input counts as 0, also where a last window (ceil_mode) reaches beyond the padding.
    ends = [(p, max(0, (out - 1) * s + k - size - p)) for size, out, k, s, p in sizes]
    if any(before or after for before, after in ends):
        x = emit(aten.constant_pad_nd.default, x, [end for pair in reversed(ends) for end in pair], 0.0)
    mean = emit(target, x, kernel, stride)
    replace_node(node, emit(aten.mul.Tensor, mean, math.prod(kernel) / divisor))


def _sizes(value: Any, axes: int) -> list[int]:
    """One size for each axis; none where none is given."""
    given = [value] if isinstance(value, int) else list(value or [])
    return given * axes if len(given) == 1 else given


@register_rewrite(aten.im2col.default)
def _permute_for_unfold(captured: CapturedModule, node: fx.Node) -> None:
    """`im2col` whose windows do not overlap: (N, C, h·kh, w·kw) → (N, C·kh·kw, h·w)."""
    arguments: Any = node.args
    x, kernel, dilation, padding, stride = arguments
    height, width = _value(x).shape[2:]
    if not _tiles((height, width), kernel, dilation, padding, stride):
        return
    (kh, kw), channels, emit = kernel, int(_value(x).shape[1]), emitter(node)
    h, w = height // kh, width // kw
    tiles = emit(aten.reshape.default, x, [-1, channels, h, kh, w, kw])
    tiles = emit(aten.permute.default, tiles, [0, 1, 3, 5, 2, 4])
    replace_node(node, emit(aten.reshape.default, tiles, [-1, channels * kh * kw, h * w]))


@register_rewrite(aten.col2im.default)
def _permute_for_fold(captured: CapturedModule, node: fx.Node) -> None:
    """`col2im` whose windows do not overlap: (N, C·kh·kw, h·w) → (N, C, h·kh, w·kw)."""
    arguments: Any = node.args
    x, size, kernel, dilation, padding, stride = arguments
    if not _tiles(size, kernel, dilation, padding, stride):
        return
    (height, width), (kh, kw) = size, kernel
    channels, emit = int(_value(x).shape[1]) // (kh * kw), emitter(node)
    tiles = emit(aten.reshape.default, x, [-1, channels, kh, kw, height // kh, width // kw])
    tiles = emit(aten.permute.default, tiles, [0, 1, 4, 2, 5, 3])
    replace_node(node, emit(aten.reshape.default, tiles, [-1, channels, height, width]))


def _tiles(size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> bool:
    """Whether windows of `kernel` lie side by side and cover `size`."""
    fits = all(isinstance(n, int) and n % k == 0 for n, k in zip(size, kernel, strict=True))
    return fits and list(stride) == list(kernel) and set(dilation) == {1} and set(padding) == {0}


@register_rewrite(aten.einsum.default)
def _einsum_as_matmul(captured: CapturedModule, node: fx.Node) -> None:
    """`einsum("bqc,bchw->bqhw", a, b)`: axes sorted into (shared, own, summed), one `matmul`, axes sorted back."""
    operands: Any = node.args[1]
    equation = str(node.args[0]).replace(" ", "")
    if "..." in equation or "->" not in equation or len(operands) != 2:
        return
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    sizes = dict(zip(left + right, (*_value(operands[0]).shape, *_value(operands[1]).shape), strict=True))
    shared = [c for c in out if c in left and c in right]
    rows, columns = [c for c in out if c not in right], [c for c in out if c not in left]
    summed = [c for c in left if c in right and c not in out]
    once = all(len(set(axes)) == len(axes) for axes in (left, right, out))
    covered = {*left, *right} == {*shared, *rows, *columns, *summed}
    unknown = [c for c in sizes if not isinstance(sizes[c], int)]
    if not (once and covered and rows and columns and summed and len(unknown) <= 1 and not {*unknown} & {*summed}):
        return
    emit = emitter(node)

    def size(*axes: str) -> int:
        return -1 if {*unknown} & {*axes} else math.prod(sizes[c] for c in axes)

    def sort(operand: Any, axes: str, first: list[str], last: list[str]) -> fx.Node:
        sorted_axes = emit(aten.permute.default, operand, [axes.index(c) for c in (*shared, *first, *last)])
        return emit(aten.reshape.default, sorted_axes, [*map(size, shared), size(*first), size(*last)])

    product = emit(
        aten.matmul.default, sort(operands[0], left, rows, summed), sort(operands[1], right, summed, columns)
    )
    apart = emit(aten.reshape.default, product, [*map(size, (*shared, *rows, *columns))])
    order = [*shared, *rows, *columns]
    replace_node(node, emit(aten.permute.default, apart, [order.index(c) for c in out]))


@register_rewrite(aten.flatten.using_ints)
def _flatten_first(captured: CapturedModule, node: fx.Node) -> None:
    """linear → flatten all but the channels → batch norm (LeViT): flatten before, so that the two are neighbours."""
    linear, emit = node.args[0], emitter(node)
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
        return
    norms = [user for user in node.users if user.target is aten.batch_norm.default]
    shaped = [user for user in linear.users if user is not node]
    known = all(user.target is aten.reshape_as.default and user.args[1] is linear for user in shaped)
    sizes = [n if isinstance(n, int) else -1 for n in _value(linear).shape]
    if not norms or len(_value(node).shape) != 2 or not known or sizes.count(-1) > 1:
        return
    flat = emit(aten.reshape.default, linear.args[0], [-1, int(_value(linear.args[0]).shape[-1])])
    moved = emit(aten.linear.default, flat, *linear.args[1:], **linear.kwargs)
    moved.meta[MODULE_PATH] = linear.meta[MODULE_PATH]
    for user in shaped:
        replace_node(user, emitter(user)(aten.reshape.default, user.args[0], sizes))
    replace_node(node, moved)


@register_rewrite(aten.avg_pool2d.default)
def _average_whole_map(captured: CapturedModule, node: fx.Node) -> None:
    """An average pool whose one window covers the map (EfficientNet's pooler) → the mean over height and width.

    ONNX Runtime's integer kernel gives zeros for a window that is wider than the map.
    """
    given = _arguments(node)
    size, kernel = _value(node.args[0]).shape[-2:], given["kernel_size"]
    covers = all(isinstance(n, int) and n <= k for n, k in zip(size, list(kernel) * 2, strict=False))
    if covers and not any(given.get("padding", ())) and given.get("divisor_override") is None:
        if tuple(_value(node).shape[-2:]) == (1, 1):
            replace_node(node, emitter(node)(aten.mean.dim, node.args[0], [-2, -1], True))


@register_rewrite(aten.slice_scatter.default)
def _join_pieces(captured: CapturedModule, node: fx.Node) -> None:
    """`slice_scatter(x, part, dim, start, end)`, what a write to a slice is without writing → a concatenation."""
    given: Any = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
    x, part, dim, start, end, step = given
    size = _value(x).shape[dim]
    if step != 1 or not isinstance(size, int) or node.kwargs:
        return
    low, high, _ = slice(start, end).indices(size)
    replace_node(node, replaced_part(emitter(node), x, part, dim, (low, high)))


@register_rewrite(aten.topk.default)
def _break_ties_by_place(captured: CapturedModule, node: fx.Node) -> None:
    """`topk` → the first k of a stable sort: of equal scores, as 8 bits make many, the first wins, as in ONNX."""
    given = _arguments(node)
    scores, count, rank = given["self"], given["k"], _value(given["self"]).dim()
    axis, users = given.get("dim", -1) % max(rank, 1), list(node.users)
    if rank == 0 or any(user.target is not operator.getitem for user in users):
        return
    chosen = emitter(node)(aten.sort.stable, scores, stable=True, dim=axis, descending=given.get("largest", True))
    for user in users:
        part = emitter(user)(operator.getitem, chosen, user.args[1])
        replace_node(user, emitter(user)(aten.slice.Tensor, part, axis, 0, count))


@register_rewrite(aten.add.Tensor)
def _recognise_frozen_norm(captured: CapturedModule, node: fx.Node) -> None:
    """x · scale + shift, computed by a module with a batch norm's statistics: `batch_norm` in evaluation mode."""
    path = module_path(node)
    module, product = captured.get_submodule(path), node.args[0]
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or not all(hasattr(module, name) for name in STATISTICS):
        return
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor or len(product.users) != 1:
        return
    epsilons = [
        float(n.args[1])
        for n in node.graph.nodes
        if n.target is aten.add.Tensor and module_path(n) == path and isinstance(n.args[1], float)
    ]
    if module_path(product) != path or not epsilons:
        return
    object.__setattr__(module, "eps", epsilons[0])  # which fusion reads
    with node.graph.inserting_before(node):
        parameters = [node.graph.get_attr(join_path(path, name)) for name in STATISTICS]
        for parameter, name in zip(parameters, STATISTICS, strict=True):
            parameter.meta = {MODULE_PATH: path, "val": getattr(module, name)}
        norm = node.graph.call_function(
            aten.batch_norm.default, (product.args[0], *parameters, False, 0.0, epsilons[0], False)
        )
    norm.meta = dict(node.meta)
    replace_node(node, norm)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an operation is called with, by the names of its schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _value(node: Any) -> Tensor:
    """The fake tensor that a node stands for."""
    value: Tensor = node.meta["val"]
    return value
