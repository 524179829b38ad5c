"""The call that is exported or compared: example inputs, and the names of what goes in and comes out."""

from __future__ import annotations

import inspect
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError, ExportError
from hf_qat.graph.capture.inputs import Inputs, guess_inputs, with_batch
from hf_qat.graph.captured import CapturedModule
from hf_qat.model.batches import types_told
from hf_qat.model.state import captured_children


#: Name of the batch axis in a file with a dynamic batch.
BATCH_AXIS = "batch"


@dataclass(frozen=True)
class ExportCall:
    """The call of a model that `torch.onnx.export` traces.

    Attributes:
        args, kwargs: example inputs, on the CPU.
        input_names: one for each tensor.
        dynamic_shapes: which axes are free, as the exporter takes it; `None` if every size is fixed.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input_names: list[str]
    dynamic_shapes: dict[str, Any] | None


def export_call(model: nn.Module, inputs: Inputs, dynamic: bool) -> ExportCall:
    """The call of `model` with `inputs`, cut to the batch that the exporter needs.

    Args:
        model: on the CPU.
        inputs: as forward takes them, batch first.
        dynamic: the batch is free; else it is 1.
    """
    # torch.export takes a size of 1 for a constant, even where it is told that the axis is dynamic.
    args, kwargs = with_batch(inputs, 2 if dynamic else 1, torch.device("cpu"))
    bound = bind(model, args, kwargs)
    # The exporter takes a dict at the end of the arguments for the arguments by name.
    by_name = bool(bound.args) and isinstance(bound.args[-1], dict)
    return ExportCall(
        args=() if by_name else bound.args,
        kwargs=dict(bound.arguments) if by_name else bound.kwargs,
        input_names=input_names(bound),
        dynamic_shapes=dynamic_batch(bound) if dynamic else None,
    )


def output_names(model: nn.Module, program: ExportedProgram, inputs: Sequence[str]) -> list[str]:
    """A name for each tensor that comes out, in order, as `named_outputs` gives it, and none of the inputs'.

    Args:
        model: for the error.
        program: of the model.
        inputs: names of what goes in.

    Raises:
        ExportError: something else than tensors comes out.
    """
    specs, leaves = program.graph_signature.output_specs, program.graph.output_node().args[0]
    assert isinstance(leaves, Sequence)
    own = [leaf for leaf, spec in zip(leaves, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    values = [leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf for leaf in own]
    result = pytree.tree_unflatten(values, program.call_spec.out_spec)
    _require_tensors(type(model).__name__, result)
    return distinct((name for name, _ in named_outputs(result)), inputs)


def set_names(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give an `onnx_ir.Graph` its names in place; what else in it has one of these gets another."""
    made = [value for node in graph for value in node.outputs]
    own = {*graph.inputs, *graph.outputs}
    others = [value for value in (*made, *graph.initializers.values()) if value not in own]
    taken = {*inputs, *outputs, *(value.name for value in others)}
    for value in [value for value in others if value.name in (*inputs, *outputs)]:
        (value.name,) = distinct([value.name], taken)
        taken.add(value.name)
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name


@torch.no_grad()
def require_tensors(model: nn.Module, call: ExportCall) -> None:
    """Raise `ExportError` for what breaks PyTorch's exporter: inputs of another type, other outputs than tensors."""
    tensors = input_tensors(bind(model, call.args, call.kwargs))
    with types_told(model, tensors, "inputs are", ExportError):
        result = model(*call.args, **call.kwargs)
    _require_tensors(type(model).__name__, result)


def _require_tensors(name: str, result: Any) -> None:
    """Refuse what an ONNX file cannot return."""
    others = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None and not isinstance(leaf, Tensor)]
    if others:
        raise ExportError(
            f"{name} returns {reprlib.repr(others[0])} of type {type(others[0]).__name__}, and an ONNX file returns "
            "tensors only: return tensors, tuples, lists or dicts of them, or export a module that does, around it."
        )


def example_of(model: nn.Module) -> Inputs:
    """Random inputs of the shapes that `model` was captured with, for a batch of 2; masks and indices are ones.

    Raises:
        CaptureError: the shapes cannot be told from the model; `example_inputs` must be given.
    """
    main_input = getattr(model, "main_input_name", None)
    for path, module in captured_children(model).items():
        tensors = _random_inputs(module)
        if not path:
            args, kwargs = module.signature.rebuild(tensors)
            return kwargs if kwargs else tuple(args)
        names = module.signature.tensor_names()
        if main_input in names:
            accepted = inspect.signature(model.forward).parameters
            return {name: tensor for name, tensor in zip(names, tensors, strict=True) if name in accepted}
    return guess_inputs(model)


def _random_inputs(module: CapturedModule) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for node, shape in zip(module.evaluation.inputs(), module.shapes, strict=True):
        values = torch.randn([2 if size is None else size for size in shape], generator=generator, dtype=torch.float32)
        dtype = node.meta["val"].dtype
        tensors.append(values.to(dtype) if dtype.is_floating_point else torch.ones_like(values, dtype=dtype))
    return tensors


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The call with its arguments by name.

    Raises:
        CaptureError: the model takes other ones.
    """
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}. Give what you would pass to "
            "the model, without labels: (images for images, labels in loader)."
        ) from error


def input_names(bound: inspect.BoundArguments) -> list[str]:
    """A name for each tensor that goes in, in order: its argument's, numbered where an argument holds several."""
    return distinct(name for name, _ in _named(_by_name(bound)))


def input_tensors(bound: inspect.BoundArguments) -> list[Tensor]:
    """Each tensor that goes in, in the order of `input_names`."""
    return [tensor for _, tensor in _named(_by_name(bound))]


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments by name; those among `**kwargs` by their own."""
    parameters = bound.signature.parameters
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        named.update(value if parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def named_outputs(result: Any) -> list[tuple[str, Tensor]]:
    """Each tensor that comes out, by its name in a `ModelOutput` or a dict; `output` or `output_<k>` elsewhere."""
    return list(_named(result if isinstance(result, Mapping) else {"output": result}))


def distinct(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """Each name, with a number where it is `taken` or was there already: `logits`, `logits_1`."""
    found: list[str] = []
    for name in names:
        tries = chain([name], (f"{name}_{number}" for number in count(1)))
        found.append(next(free for free in tries if free not in taken and free not in found))
    return found


def dynamic_batch(bound: inspect.BoundArguments) -> dict[str, Any]:
    """`dynamic_shapes` for `torch.onnx.export`: the first axis of every tensor is the batch."""

    def axes(leaf: Any) -> dict[int, str] | None:
        return {0: BATCH_AXIS} if isinstance(leaf, Tensor) and leaf.dim() else None

    shapes: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        shape = pytree.tree_map(axes, value)
        keywords = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        shapes.update(shape if keywords else {name: shape})
    return shapes


def _named(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order in which torch flattens the values of `tree`, by the innermost name.

    Where several have that name, those that are nested get the names around it, too: `decoder_output_hidden_state`.
    """
    found = list(_paths(tree))
    of_name = Counter(path[-1] for path, _ in found)
    for path, tensor in found:
        yield path[-1] if of_name[path[-1]] == 1 else "_".join(path), tensor


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Each tensor with the names around it and its own, which is numbered where it stands in a sequence."""
    for name, value in tree.items():
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if len(leaves) == 1 or not isinstance(value, Mapping):
            for position, leaf in enumerate(leaves):
                yield ((name if len(leaves) == 1 else f"{name}_{position}"),), leaf
        else:
            yield from (((name, *path), leaf) for path, leaf in _paths(value))
