"""Which outputs of the captured children reach what the model itself returns, through its own Python code."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.graph.call_signature import Slot
from hf_qat.graph.capture.inputs import Inputs, device_of, with_batch
from hf_qat.graph.capture.modes import evaluating, shadowed
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.plan import Port
from hf_qat.graph.random_state import random_state_kept
from hf_qat.quantization.class_swap import original_class


logger = logging.getLogger(__name__)

#: Of the run that looks; more than 1, which some code treats otherwise.
BATCH_SIZE = 2


def model_outputs(model: nn.Module, captured: Mapping[str, CapturedModule], inputs: Inputs) -> frozenset[Port]:
    """Outputs of captured children that the result of `model` is computed from, no other captured child in between.

    The model is run once, its children in Python as before their capture; autograd says what the result depends on.

    Args:
        model: captured, and not changed otherwise yet; it may be on the meta device.
        captured: its captured children by path.
        inputs: that it was captured with.

    Returns:
        All outputs of a model that was captured as a whole. Where the model's own code does not let gradients through,
        all outputs of the children that feed no other child.
    """
    if "" in captured:
        return frozenset(("", position) for position in range(_num_outputs(captured[""])))
    found = _reached(model, captured, inputs)
    if found:
        return found
    feeding = {path for module in captured.values() for path, _ in module.producer_of_input.values()}
    final = [path for path in captured if path not in feeding]
    return frozenset((path, position) for path in final for position in range(_num_outputs(captured[path])))


def _num_outputs(module: CapturedModule) -> int:
    return module.evaluation.result_leaves.count(Slot.TENSOR)


def _reached(model: nn.Module, captured: Mapping[str, CapturedModule], inputs: Inputs) -> frozenset[Port]:
    leaves: dict[int, tuple[Port, Tensor]] = {}
    device, looking = device_of(model), _outputs_as_leaves(captured, leaves)
    args, kwargs = with_batch(inputs, BATCH_SIZE, device)
    try:
        with evaluating(model), random_state_kept(device), torch.enable_grad(), looking:
            result = model(*args, **kwargs)
    except Exception as error:
        logger.debug("The model's own code does not run with gradients (%s).", error)
        return frozenset()
    variables = variables_of(result)
    return frozenset(port for port, leaf in leaves.values() if id(leaf) in variables)


def _outputs_as_leaves(
    captured: Mapping[str, CapturedModule], leaves: dict[int, tuple[Port, Tensor]]
) -> AbstractContextManager[None]:
    """Inside, what a captured child returns depends on one leaf for each tensor, which is noted in `leaves`."""
    return shadowed("forward", {module: _forward_to_leaves(path, module, leaves) for path, module in captured.items()})


def _forward_to_leaves(
    path: str, module: CapturedModule, leaves: dict[int, tuple[Port, Tensor]]
) -> Callable[..., Any]:
    original: Any = original_class(type(module))

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            values, spec = pytree.tree_flatten(original.forward(module, *args, **kwargs))
        tensors = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
        for position, k in enumerate(tensors):
            values[k] = _leaf((path, position), values[k], leaves)
        return pytree.tree_unflatten(values, spec)

    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    return forward


def _leaf(port: Port, value: Tensor, leaves: dict[int, tuple[Port, Tensor]]) -> Tensor:
    """A copy of `value`, which the caller may write to, that depends on a new leaf."""
    if not value.is_floating_point():
        return value
    leaf = value.detach().requires_grad_()
    leaves[id(leaf)] = port, leaf
    return leaf.clone()


def variables_of(result: Any) -> set[int]:
    """Ids of the leaves, parameters among them, that autograd knows the tensors of `result` to depend on."""
    stack = [x.grad_fn for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    seen: set[Any] = set()
    variables = set()
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        variables.add(id(getattr(function, "variable", None)))
        stack += [following for following, _ in function.next_functions]
    return variables
