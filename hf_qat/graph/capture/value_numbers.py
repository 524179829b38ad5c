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
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qat.graph.capture.aten_calls import flatten_arguments, tensors_in, written_by, written_places
from hf_qat.graph.capture.clean import Extended
from hf_qat.graph.capture.meta_device import META, without_weights
from hf_qat.graph.capture.modes import put_into_mode
from hf_qat.graph.capture.numbering import Numbering
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.random_state import random_state_kept


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

#: What their result holds is not defined.
UNDEFINED = frozenset({aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided})


class UndecidedError(Exception):
    """Something needs the value of a tensor, or memory is shared in a way that is not followed."""


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
        flat, spec = flatten_arguments(args, kwargs)
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
        if written_places(func):
            values = [x.clone() if isinstance(x, Tensor) else x for x in values]
        values = [torch.device("cpu") if x == META else x for x in values]
        return spec.unflatten(values)

    def _record(self, func: Any, call: Any, flattened: Any, result: Any) -> None:
        """Number what an operation returned, and what it wrote to."""
        args, kwargs = call
        flat, spec, numbers = flattened
        written = written_by(func, args, kwargs)
        if any(tensor.device != META for tensor in written):
            raise UndecidedError("a write to a tensor on another device")
        results = tensors_in(result)
        if not results and not written:
            return
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not random and func.overloadpacket not in UNDEFINED and self._is_known(numbers):
            known_args, known_kwargs = self._known_arguments(func, flat, spec, numbers)
            known = func(*known_args, **known_kwargs)
            found = [self._numbering.of_known(x) for x in tensors_in(known)]
        else:
            self._draws += random
            found = self._numbering.of_results(func, flat, numbers, results, self._draws if random else None)
        for tensor, number in zip(results, found, strict=True):
            self._note(tensor, number, any(tensor is w for w in written))
        for k, tensor in enumerate(written):
            if not any(tensor is r for r in results):
                self._note(tensor, self._numbering.of_written(func, k, flat, numbers, tensor.shape), True)

    def _is_known(self, numbers: list[int | None]) -> bool:
        return all(number is None or number in self._numbering.known for number in numbers)


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


def is_costly(graph: fx.Graph) -> bool:
    """Whether a run of the graph takes more than `FEW_MULTIPLICATIONS`."""
    total = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS:
            first, second = (node.args[k].meta["val"] for k in (0, 1))
            inner = second.numel() // max(1, second.shape[0]) if node.target in WEIGHTED else first.shape[-1]
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
    with random_state_kept(), torch.set_grad_enabled(gradients), _Data(), trace:
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
