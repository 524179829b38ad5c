"""Proof that a captured graph computes what the module computes: outputs, gradients, written buffers, random numbers.

The exporter follows Python, and Python can do what it does not see: a backward pass of its own, a hook on a tensor, a
branch on the size of the batch. So the two are run side by side, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError
from hf_qat.graph.call_signature import CallSignature
from hf_qat.graph.capture.call_record import CallRecord
from hf_qat.graph.capture.clean import Extended
from hf_qat.graph.capture.guards import shape_at
from hf_qat.graph.capture.inputs import BATCH_SIZES, repeated, with_noise
from hf_qat.graph.capture.modes import buffers_kept, modes_kept, put_into_mode
from hf_qat.graph.capture.numbering import Numbering
from hf_qat.graph.capture.value_numbers import is_costly, known_equal
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.random_state import random_state_kept


#: Largest difference that counts as none, relative to the largest value of a tensor: that of another order of sums.
TOLERANCE = 1e-4

#: Batch sizes, beside that of the examples, at which a graph is compared with its module: one, and an odd one.
PROVEN_SIZES = (1, 5)

#: Size of the change of the example inputs at these, relative to their spread.
PERTURBATION = 0.1

#: Seed of the random numbers of both runs.
SEED = 20


@dataclass
class _Observed:
    """What one run showed; gradients are `None` where there are none."""

    outputs: list[Any]
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    inputs: list[Tensor]


def prove(name: str, record: CallRecord, graph: CapturedGraph, constants: dict[str, Tensor]) -> None:
    """Compare a graph with its module on the example inputs, and on changed ones of other batch sizes.

    Args:
        name: of the module, for the message.
        record: calls of it in the mode of the graph.
        graph: that was captured by them.
        constants: what the graph reads that the module does not have.

    Raises:
        CaptureError: they differ.
    """
    numbering, costly = Numbering(), is_costly(graph.graph)
    samples = [record.inputs[0]]
    if graph.training and len(record.inputs) > len(BATCH_SIZES):  # its sizes depend on the labels, too
        samples.append(record.inputs[-1])
    else:
        sizes = graph.doubtful_sizes if graph.training else (*PROVEN_SIZES, *graph.doubtful_sizes)
        others = [sample for size in sizes if (sample := _sample(record, size)) is not None]
        # Batch norm in training takes no batch of one.
        samples = others if others and costly and not graph.training else samples + others
    for sample in samples:
        gradients = sample is samples[0] or not costly
        if costly and known_equal(record.module, graph, constants, sample, gradients, numbering):
            continue
        difference = first_difference(record.module, graph, constants, sample, gradients)
        if difference is not None:
            mode = "training" if graph.training else "evaluation"
            shapes = [tuple(x.shape) for x in sample]
            raise CaptureError(
                f"{name} computes something else than what torch.export sees of it: in {mode}, on inputs of "
                f"shapes {shapes}, {difference}"
            )


def _sample(record: CallRecord, size: int) -> list[Tensor] | None:
    """The example inputs, a little changed, at another batch size; `None` if no input depends on it."""
    first, last = record.inputs[0], record.inputs[-1]
    if all(x.shape == y.shape for x, y in zip(first, last, strict=True)):
        return None
    generator = torch.Generator().manual_seed(size)
    resized = []
    for x, y in zip(first, last, strict=True):
        for dim, (n, wanted) in enumerate(zip(x.shape, shape_at(size, x, y), strict=True)):
            if n != wanted:
                x = repeated(x, wanted, dim)
        if x.is_floating_point():
            x = with_noise(x, PERTURBATION, generator)
        resized.append(x)
    return resized


def first_difference(
    module: nn.Module,
    captured: CapturedGraph,
    constants: dict[str, Tensor],
    tensors: Sequence[Tensor],
    gradients: bool,
) -> str | None:
    """In which respect the graph differs from the module on these inputs, in words; `None` if in none.

    Args:
        module: the float module; its buffers, modes and the random state are afterwards as before.
        captured: its graph.
        constants: what the graph reads that the module does not have.
        tensors: flat inputs.
        gradients: compare those of the inputs and of every parameter, too.
    """
    extended = Extended(module, constants)

    def run_graph(inputs: list[Tensor]) -> Any:
        return captured.compute(extended, inputs)

    with modes_kept(module):
        put_into_mode(module, captured.training)
        theirs = _observe(module, _caller(module, captured.signature), tensors, gradients)
        ours = _observe(module, run_graph, tensors, gradients)
    return _compare(ours, theirs)


def runs(module: nn.Module, signature: CallSignature, tensors: Sequence[Tensor], training: bool) -> bool:
    """Whether the module's own forward takes these inputs in a mode; it is afterwards as before."""
    with modes_kept(module):
        put_into_mode(module, training)
        return not isinstance(_observe(module, _caller(module, signature), tensors, gradients=False), Exception)


def _caller(module: nn.Module, signature: CallSignature) -> Callable[[list[Tensor]], Any]:
    """Calls the module on flat inputs."""

    def call(inputs: list[Tensor]) -> Any:
        args, kwargs = signature.rebuild(inputs)
        return module(*args, **kwargs)

    return call


def _observe(module: nn.Module, run: Any, tensors: Sequence[Tensor], gradients: bool) -> _Observed | Exception:
    inputs = [x.detach().clone() for x in tensors]
    leaves = [x for x in inputs if gradients and x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    # A module may write to what it is given, which a leaf that needs a gradient does not allow.
    given = [x.clone() if x.requires_grad else x for x in inputs]
    parameters = [p for p in module.parameters() if p.requires_grad] if gradients else []
    buffers = list(module.buffers())  # those of before the run, which may put others in their places
    with buffers_kept(module), random_state_kept(*{x.device for x in tensors}), torch.set_grad_enabled(gradients):
        torch.manual_seed(SEED)
        try:
            outputs = pytree.tree_leaves(run(given))
            found = _gradients(outputs, [*leaves, *parameters])
        except Exception as error:
            return error
        return _Observed(
            [x.detach().clone() if isinstance(x, Tensor) else x for x in outputs],
            found,
            [buffer.clone() for buffer in buffers],
            [x.detach() for x in given],
        )


def _gradients(outputs: list[Any], leaves: list[Tensor]) -> list[Tensor | None]:
    """Those of a sum of all outputs in which every value has another weight."""
    differentiable = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves or not differentiable:
        return [None] * len(leaves)
    weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float32).view(x.shape).to(x) for x in differentiable]
    return list(torch.autograd.grad(differentiable, leaves, weights, allow_unused=True))


def _compare(ours: _Observed | Exception, theirs: _Observed | Exception) -> str | None:
    if isinstance(theirs, Exception):
        return None if isinstance(ours, Exception) else f"its own code fails there ({theirs})"
    if isinstance(ours, Exception):
        return f"the captured graph fails ({ours})"
    if len(ours.outputs) != len(theirs.outputs) or not all(map(_same, ours.outputs, theirs.outputs)):
        return "its outputs are others"
    if not all(map(_same, ours.gradients, theirs.gradients)):
        return "its gradients are others: it has a backward pass of its own"
    if not all(map(_same, ours.buffers, theirs.buffers)):
        return "it writes other values into its buffers"
    if not all(map(_same, ours.inputs, theirs.inputs)):
        return "it writes into what it is given"
    return None


def _same(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return ours is theirs or (not isinstance(ours, Tensor) and not isinstance(theirs, Tensor) and ours == theirs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if torch.equal(ours, theirs):  # in one pass over them; the next takes six
        return True
    if not theirs.is_floating_point():
        return False
    finite = theirs[theirs.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=0.0, atol=TOLERANCE * size, equal_nan=True)
