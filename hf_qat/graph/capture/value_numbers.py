"""Proof without computing: module and graph are run on the meta device, and every value gets a number.

Value numbering (Cocke and Schwartz 1970): two values have the same number if they come of the same ATen operation on
values of the same numbers, with the same other arguments. So if outputs, gradients and written buffers of the module
and of its graph have equal numbers, both run the same operations on the same data, forward and backward, whatever the
weights are. It costs no arithmetic. Unequal numbers prove nothing: another way to write the same is not recognised.

What is known without inputs and parameters (masks, position grids) is computed, because capture computes it, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qat.graph.capture.clean import Extended
from hf_qat.graph.capture.meta_device import META, without_weights
from hf_qat.graph.capture.modes import put_into_mode
from hf_qat.graph.captured_graph import CapturedGraph


logger = logging.getLogger(__name__)

aten = torch.ops.aten

#: Up to so many multiplications it is cheap enough to compute, which proves more: the kernels, too.
FEW_MULTIPLICATIONS = 10**8

#: Operations whose second argument is a weight: one product of it, but for its first axis, gives one value.
WEIGHTED = frozenset(
    {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv_transpose2d.input}
)

#: Operations that multiply and add up.
PRODUCTS = WEIGHTED | {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default}

#: They return the values of their first argument, perhaps in memory of another layout.
COPIES = frozenset({aten.clone, aten.alias, aten.detach, aten.lift_fresh})

#: They return the values of their first argument in the same order, in another shape.
RESHAPES = frozenset({aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze})

#: They take a part of an axis, or put a part of a gradient back into zeros. Where nothing is left out, the result is
#: the first argument: an axis that keeps its length is whole, because steps are positive.
SLICES = frozenset({aten.slice, aten.slice_backward})

#: The order of their two arguments does not matter.
COMMUTATIVE = frozenset({aten.add, aten.mul})

#: What their result holds is not defined.
UNDEFINED = frozenset({aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided})

#: It writes to the running statistics, its arguments 3 and 4, though its schema does not say so.
BATCH_NORM = aten.native_batch_norm.default


class UndecidedError(Exception):
    """Something needs the value of a tensor, or memory is shared in a way that is not followed."""


class _Layouts:
    """Runs operations on the meta device; what a layer does to layouts is found out once for all layers like it."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}

    def run(self, func: Any, flat: list[Any], spec: _Spec) -> Any:
        """The result of `func` on arguments that were flattened into `flat`, as tensors without values."""
        if _functional(func) is not func.overloadpacket:
            return flat[0]
        key = (func, spec, *map(_layout, flat)) if _makes_memory(func) else None
        if key is not None and key in self._results:
            known = self._results[key]
            return _empty(known) if isinstance(known, _Layout) else tuple(map(_empty, known))
        here = [x.to(META) if isinstance(x, Tensor) and x.device != META else x for x in flat]
        args, kwargs = spec.unflatten(here)
        result = func(*args, **kwargs)
        if key is not None:
            self._results[key] = tuple(map(_layout, result)) if isinstance(result, (tuple, list)) else _layout(result)
        return result


class _Layout(NamedTuple):
    """Of a tensor in memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout(value: Any) -> Any:
    """What the layout of a result depends on in an argument."""
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return type(value), str(value)


def _empty(layout: Any) -> Any:
    """A tensor without values; what is no layout of one stands for `None`."""
    if not isinstance(layout, _Layout):
        return None
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=META)


class _Spec(NamedTuple):
    """How the arguments of an operation were, before they were flattened: one list in another at most."""

    positional: int
    keys: tuple[str, ...]
    lengths: tuple[int | None, ...]

    def unflatten(self, flat: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """`(args, kwargs)` of leaves."""
        leaves = iter(flat)
        values = [next(leaves) if n is None else list(islice(leaves, n)) for n in self.lengths]
        return values[: self.positional], dict(zip(self.keys, values[self.positional :], strict=True))


def _flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], _Spec]:
    """Leaves of the arguments of an operation."""
    flat: list[Any] = []
    lengths: list[int | None] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            flat += value
            lengths.append(len(value))
        else:
            flat.append(value)
            lengths.append(None)
    return flat, _Spec(len(args), tuple(kwargs), tuple(lengths))


def _tensors(values: Any) -> list[Tensor]:
    """Those among what an operation returned, or in one argument of it."""
    return [x for x in (values if isinstance(values, (tuple, list)) else (values,)) if isinstance(x, Tensor)]


class Numbering:
    """A number for each value, the same in all runs that share this object."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.known: dict[int, Tensor] = {}
        self.reshaped: dict[int, int] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.layouts = _Layouts()
        self._terms: dict[int, tuple[int, ...]] = {}
        self._zero: dict[int, bool] = {}

    def of(self, description: Any, shape: torch.Size) -> int:
        """The number of the value with this description."""
        number = self._numbers.setdefault(description, len(self._numbers))
        self.shapes[number] = shape
        return number

    def of_known(self, value: Tensor) -> int:
        """The number of a tensor whose values are known."""
        value = value.detach().contiguous()
        content = blake2b(value.reshape(-1).view(torch.uint8).numpy().data).digest() if value.numel() else b""
        number = self.of(("known", value.dtype, value.shape, content), value.shape)
        self.known.setdefault(number, value)
        return number

    def is_zero(self, number: int | None) -> bool:
        """Whether a value is known to be zero everywhere."""
        if number not in self.known:
            return False
        if number not in self._zero:
            self._zero[number] = not self.known[number].any()
        return self._zero[number]

    def of_reshaped(self, number: int, shape: torch.Size) -> int:
        """The number of a value in another shape."""
        base = self.reshaped.get(number, number)
        if self.shapes[base] == shape:
            return base
        reshaped = self.of(("reshaped", base, shape), shape)
        self.reshaped[reshaped] = base
        return reshaped

    def of_sum(self, numbers: list[Any], shape: torch.Size) -> int:
        """The number of a sum, whose terms autograd may add up in any order."""
        terms = tuple(sorted(term for number in numbers for term in self._terms.get(number, (number,))))
        total = self.of(("sum", *terms), shape)
        self._terms[total] = terms
        return total


class _Data(TorchFunctionMode):
    """`torch.tensor(data, device="meta")` would lose its data: it is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"})
        return func(*args, **kwargs)


class _Run(TorchDispatchMode):
    """One run: the number of what each piece of memory holds now."""

    def __init__(self, numbering: Numbering) -> None:
        super().__init__()
        self._numbering = numbering
        self._memory: dict[int, dict[Any, int]] = {}
        self._kept: list[Tensor] = []  # memory that is freed would be used again
        self._draws = 0

    def name(self, tensor: Tensor, description: Any) -> None:
        """Give the value of an input a number."""
        self._note(tensor, self._numbering.of(description, tensor.shape))

    def number(self, tensor: Tensor) -> int:
        """What is in `tensor` now.

        Raises:
            UndecidedError: its memory was written to under another shape.
        """
        if tensor.device != META:
            return self._numbering.of_known(tensor)
        places = self._memory.get(tensor.untyped_storage()._cdata, {})
        number = places.get(_place(tensor))
        if number is None:
            number = self._in_another_shape(tensor, places)
        return number

    def _in_another_shape(self, tensor: Tensor, places: dict[Any, int]) -> int:
        offset, shape, _, dtype = _place(tensor)
        for (other_offset, other_shape, stride, other_dtype), number in places.items():
            same = (offset, dtype, shape.numel()) == (other_offset, other_dtype, other_shape.numel())
            if same and tensor.is_contiguous() and _is_contiguous(other_shape, stride):
                return self._numbering.of_reshaped(number, shape)
        raise UndecidedError("memory whose content is not known")

    def _note(self, tensor: Tensor, number: int, written: bool = False) -> None:
        storage = tensor.untyped_storage()._cdata
        if written or storage not in self._memory:
            self._memory[storage] = {}
        self._memory[storage][_place(tensor)] = number
        self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = _flatten(args, kwargs)
        if all(x.device != META for x in flat if isinstance(x, Tensor)) and not _makes_meta(kwargs):
            return func(*args, **kwargs)
        numbers = [self.number(x) if isinstance(x, Tensor) else None for x in flat]
        if torch.Tag.inplace_view in func.tags:
            return self._change_layout(func, args, kwargs)
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
            return self._ask(func, flat, spec, numbers)
        result = self._numbering.layouts.run(func, flat, spec)
        self._record(func, (args, kwargs), (flat, spec, numbers), result)
        return result

    def _change_layout(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Pooling to one pixel rewrites the strides of its result, along axes of length 1."""
        number, before = self.number(args[0]), _place(args[0])
        result = func(*args, **kwargs)
        if _place(result) != before:
            raise UndecidedError(f"{func} changes a tensor's shape")
        self._note(result, number)
        return result

    def _ask(self, func: Any, flat: list[Any], spec: Any, numbers: list[int | None]) -> Any:
        """Answer a question for a value, where it is known."""
        args, kwargs = self._known_arguments(func, flat, spec, numbers)
        return func(*args, **kwargs)

    def _known_arguments(self, func: Any, flat: list[Any], spec: Any, numbers: list[int | None]) -> Any:
        if not all(number is None or number in self._numbering.known for number in numbers):
            raise UndecidedError("a question for a value")
        pairs = zip(flat, numbers, strict=True)
        values = [x if n is None else self._numbering.known[n] for x, n in pairs]
        if _written_places(func):
            values = [x.clone() if isinstance(x, Tensor) else x for x in values]
        values = [torch.device("cpu") if x == META else x for x in values]
        return spec.unflatten(values)

    def _record(self, func: Any, call: Any, flattened: Any, result: Any) -> None:
        """Number what an operation returned, and what it wrote to."""
        args, kwargs = call
        flat, spec, numbers = flattened
        written = _written(func, args, kwargs)
        if any(tensor.device != META for tensor in written):
            raise UndecidedError("a write to a tensor on another device")
        results = _tensors(result)
        if not results and not written:
            return
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not random and func.overloadpacket not in UNDEFINED and self._is_known(numbers):
            known_args, known_kwargs = self._known_arguments(func, flat, spec, numbers)
            known = func(*known_args, **known_kwargs)
            found = [self._numbering.of_known(x) for x in _tensors(known)]
        else:
            self._draws += random
            found = self._described(func, flat, numbers, results, self._draws if random else None)
        for tensor, number in zip(results, found, strict=True):
            self._note(tensor, number, any(tensor is w for w in written))
        for k, tensor in enumerate(written):
            if not any(tensor is r for r in results):
                described = (str(func), k, "written", *map(_plain, flat, numbers))
                self._note(tensor, self._numbering.of(described, tensor.shape), True)

    def _is_known(self, numbers: list[int | None]) -> bool:
        return all(number is None or number in self._numbering.known for number in numbers)

    def _described(
        self, func: Any, flat: list[Any], numbers: list[int | None], results: list[Tensor], draw: int | None
    ) -> list[int]:
        """The numbers of results by operation and arguments."""
        packet = _functional(func)
        first = next((n for n in numbers if n is not None), None)
        if len(results) == 1 and first is not None:
            out = results[0]
            same = out.dtype == _dtype(flat)
            if packet in RESHAPES or packet is aten.expand and out.shape == self._numbering.shapes[first]:
                return [self._numbering.of_reshaped(first, out.shape)]
            if packet in COPIES or packet is aten._to_copy and same:
                return [first]
            if (
                packet is aten.copy
                and out.shape == self._numbering.shapes[numbers[1] or 0]
                and flat[1].dtype == out.dtype
            ):
                return [numbers[1] or 0]
            if packet is aten.add and same and (kept := self._unchanged_sum(flat, numbers, out)) is not None:
                return [kept]
            if packet in SLICES and out.shape == self._numbering.shapes[first]:
                return [first]
            if packet is aten.constant_pad_nd and not any(flat[1:-1]):
                return [first]
            if packet is aten.add and same and len(flat) == 2 and self._are_alike(flat, numbers, out):
                return [self._numbering.of_sum(numbers, out.shape)]
        described = [*map(_plain, flat, numbers)]
        if packet in COMMUTATIVE and len(described) == 2:
            described.sort(key=str)
        return [
            self._numbering.of((str(packet), func._overloadname, k, draw, *described), x.shape)
            for k, x in enumerate(results)
        ]

    def _are_alike(self, flat: list[Any], numbers: list[int | None], out: Tensor) -> bool:
        pairs = zip(flat, numbers, strict=True)
        return all(n is not None and x.dtype == out.dtype and self._numbering.shapes[n] == out.shape for x, n in pairs)

    def _unchanged_sum(self, flat: list[Any], numbers: list[int | None], out: Tensor) -> int | None:
        """The summand that a sum equals, because the other is zero everywhere."""
        for kept, other in ((0, 1), (1, 0)):
            number, added = numbers[kept], numbers[other]
            if number is None or not self._numbering.is_zero(added):
                continue
            if self._numbering.shapes[number] == out.shape and flat[kept].dtype == out.dtype:
                return number
        return None


def _place(tensor: Tensor) -> Any:
    shape, stride = tensor.shape, tensor.stride()
    if 1 in shape:  # along such an axis nothing is ever stepped over
        stride = tuple(0 if n == 1 else step for n, step in zip(shape, stride, strict=True))
    return tensor.storage_offset(), shape, stride, tensor.dtype


def _is_contiguous(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _makes_meta(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]) == META


def _dtype(flat: list[Any]) -> torch.dtype | None:
    return next((x.dtype for x in flat if isinstance(x, Tensor)), None)


def _plain(value: Any, number: int | None) -> Any:
    """What stands for an argument in a description: of 1, 1.0 and True, each is another."""
    if number is not None:
        return "value", number
    return (type(value).__name__, value if isinstance(value, (int, float, str)) else str(value))


@cache
def _makes_memory(func: Any) -> bool:
    return not any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns))


@cache
def _functional(func: Any) -> Any:
    """The operation that returns what an in-place one writes; a functional one itself."""
    name = func._schema.name.split("::")[1]
    if func._schema.is_mutable and name.endswith("_"):
        return getattr(aten, name[:-1], func.overloadpacket)
    return func.overloadpacket


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that the operation writes to."""
    if func is BATCH_NORM:
        return _tensors(args[3:5]) if args[5] else []
    places = _written_places(func)
    return [x for k, name in places for x in _tensors(args[k] if k < len(args) else kwargs.get(name))]


@cache
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that the schema says are written to."""
    arguments = enumerate(func._schema.arguments)
    return [(k, x.name) for k, x in arguments if x.alias_info is not None and x.alias_info.is_write]


def is_costly(graph: fx.Graph) -> bool:
    """Whether a run of the graph takes more than `FEW_MULTIPLICATIONS`."""
    total = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS:
            first, second = (node.args[k].meta["val"] for k in (0, 1))
            inner = second.numel() // second.shape[0] if node.target in WEIGHTED else first.shape[-1]
            result = node.meta["val"].numel()
            if free_unbacked_symbols(result * inner):
                return False  # as many as there are True in a mask: nobody knows before it is computed
            total += int(result) * int(inner)
    return total > FEW_MULTIPLICATIONS


def known_equal(
    module: nn.Module,
    captured: CapturedGraph,
    constants: dict[str, Tensor],
    tensors: Sequence[Tensor],
    gradients: bool,
    numbering: Numbering,
) -> bool:
    """Whether the graph is known to compute what the module does, at the shapes of `tensors`; `False`: maybe not.

    Args:
        module: the float module, which stays as it is.
        captured: its graph.
        constants: what the graph reads that the module does not have.
        tensors: flat inputs, of which only shapes and types count.
        gradients: compare those of the inputs and of every parameter, too.
        numbering: of all proofs about this module.
    """
    try:
        on_meta = without_weights(module)
        put_into_mode(on_meta, captured.training)
        extended = Extended(on_meta, constants)

        def run_module(inputs: list[Tensor]) -> Any:
            args, kwargs = captured.signature.rebuild(inputs)
            return on_meta(*args, **kwargs)

        def run_graph(inputs: list[Tensor]) -> Any:
            return captured.compute(extended, inputs)

        theirs = _observe(on_meta, run_module, tensors, gradients, numbering)
        return theirs == _observe(on_meta, run_graph, tensors, gradients, numbering)
    except Exception as error:
        logger.debug("%s is not proven on the meta device (%s).", type(module).__name__, error)
        return False


def _observe(
    module: nn.Module, run: Any, tensors: Sequence[Tensor], gradients: bool, numbering: Numbering
) -> list[Any]:
    """Numbers, shapes and types of outputs, gradients, buffers and inputs after one run.

    Raises:
        UndecidedError: they cannot be found.
    """
    leaves = [torch.empty(x.shape, dtype=x.dtype, device=META) for x in tensors]
    differentiable = [x.requires_grad_() for x in leaves if gradients and x.is_floating_point()]
    differentiable += [p for p in module.parameters() if gradients and p.requires_grad]
    trace = _Run(numbering)
    for k, leaf in enumerate(leaves):
        trace.name(leaf, ("input", k))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        trace.name(tensor, ("module", name))
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients), _Data(), trace:
        given = [x.clone() for x in leaves]
        outputs = pytree.tree_leaves(run(given))
        seen = [x for x in outputs if isinstance(x, Tensor)]
        values = [_described(trace, x) if isinstance(x, Tensor) else x for x in outputs]
        after = [_described(trace, x) for x in (*module.buffers(), *given)]
        ends = [x for x in seen if x.requires_grad]
        if not ends or not differentiable:
            return [values, after]
        weights = [torch.empty_like(x) for x in ends]
        for k, weight in enumerate(weights):
            trace.name(weight, ("gradient", k))
        found = torch.autograd.grad(ends, differentiable, weights, allow_unused=True)
        return [values, after, [None if x is None else _described(trace, x) for x in found]]


def _described(trace: _Run, tensor: Tensor) -> Any:
    return trace.number(tensor), tensor.shape, tensor.dtype, tensor.requires_grad
